# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from headkv_mm.calibration import Calibration, NeedlePrompt, calibrate, needle_prompt, procedure
from headkv_mm.calibration.watching import WatchedCache, attention_rows, retrieved, span_mass, watched
from headkv_mm.demo.text_tokenizer import build_text_tokenizer
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import head_table_for, save_head_table

WORDS = build_text_tokenizer()
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "max_position_embeddings": 512,
    "pad_token_id": WORDS.pad_token_id,
    "bos_token_id": WORDS.bos_token_id,
    "eos_token_id": WORDS.eos_token_id,
}
FEW = Calibration(examples=4, length=90, max_new_tokens=6)


def small_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def small_gemma() -> Gemma2ForCausalLM:
    """Softcap in the attention, and every other layer slides."""
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, attn_logit_softcapping=2.0, sliding_window=16, query_pre_attn_scalar=8)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, whose tokens cross the borders of words and signs."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = [needle_prompt(WORDS, rng, 200, 0.5).text for _ in range(10)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template, padding_side="left"
    )


def naive_mass(query: Tensor, keys: Tensor, span: tuple[int, int], scale: float) -> list[float]:
    """The definition, head by head and entry by entry."""
    heads, groups = query.shape[0], keys.shape[0]
    found = []
    for head in range(heads):
        rows = keys[head * groups // heads]
        logits = np.array([float(query[head].double() @ row.double()) * scale for row in rows])
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        n = span[1] - span[0]
        best = sorted(range(len(weights)), key=lambda column: -weights[column])[:n]
        found.append(sum(weights[column] for column in best if span[0] <= column < span[1]) / n)
    return found


def retrieval_mass(query: Tensor, keys: Tensor, span: tuple[int, int], **options: Any) -> Tensor:
    return retrieved(attention_rows(query, keys, **options), span)


@given(groups=st.integers(1, 3), share=st.integers(1, 3), tokens=st.integers(3, 30), seed=st.integers(0, 99))
def test_retrieval_mass_is_its_definition(groups: int, share: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(groups * share, 8, generator=generator)
    keys = torch.randn(groups, tokens, 8, generator=generator)
    first = int(torch.randint(0, tokens - 1, (), generator=generator))
    end = int(torch.randint(first + 1, tokens + 1, (), generator=generator))
    found = retrieval_mass(query, keys, (first, end), scale=0.7)
    assert found.tolist() == pytest.approx(naive_mass(query, keys, (first, end), 0.7), abs=1e-6)


def test_retrieval_mass_of_heads_that_look_there_and_elsewhere() -> None:
    keys = torch.eye(8)[None]  # one KV head; entry i is found by the unit vector i
    query = 100 * torch.stack([torch.eye(8)[2] + torch.eye(8)[3], torch.eye(8)[6]])
    found = retrieval_mass(query, keys, (2, 4), scale=1.0)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0]))


def test_the_mass_of_a_span_is_all_of_its_attention() -> None:
    rows = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0]])
    assert span_mass(rows, (1, 3)).tolist() == [0.375, 1.0]


def test_retrieval_mass_sees_what_the_attention_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 8, generator=generator), torch.randn(2, 10, 8, generator=generator)
    plain = retrieval_mass(query, keys[:, 3:], (1, 4), scale=0.5)
    hidden = torch.arange(10) < 3
    for mask in (~hidden[None, None, None], torch.zeros(1, 1, 1, 10).masked_fill(hidden, torch.finfo().min)):
        torch.testing.assert_close(retrieval_mass(query, keys, (4, 7), scale=0.5, mask=mask), plain)
    sinks = torch.tensor([-40.0, 40.0, 0.0, 0.0])
    with_sinks = retrieval_mass(query, keys[:, 3:], (1, 4), scale=0.5, sinks=sinks)
    assert float(with_sinks[0]) == pytest.approx(float(plain[0]))
    assert float(with_sinks[1]) < 1e-9
    assert float(with_sinks[2]) < float(plain[2])
    logits = 0.3 * torch.tanh((query.unflatten(0, (2, 2)) @ keys.mT).flatten(0, 1) * 0.5 / 0.3)  # [H, T]
    capped = torch.stack([retrieval_mass(torch.ones(1, 1), row[None, :, None], (1, 4), scale=1.0)[0] for row in logits])
    torch.testing.assert_close(retrieval_mass(query, keys, (1, 4), scale=0.5, softcap=0.3), capped)


def naive_scores(model: Any, tokenizer: Any, calibration: Calibration, layers: list[int]) -> Tensor:
    """Whole attention maps of prompt and answer, [layers, H], the mean over all prompts."""
    model.set_attn_implementation("eager")
    total = torch.zeros(len(layers), model.config.num_attention_heads, dtype=torch.float64)
    for index in range(calibration.examples):
        rng = random.Random(f"heads {calibration.seed} {index}")
        prompt = needle_prompt(tokenizer, rng, calibration.length, index % 10 / 9)
        ids = torch.tensor([prompt.ids])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=calibration.max_new_tokens, do_sample=False
        )
        with torch.no_grad():
            maps = model(output[:, :-1], output_attentions=True).attentions
        first, end = prompt.span
        for row, layer in enumerate(layers):
            for step in range(ids.shape[1] - 1, output.shape[1] - 1):
                attention = maps[layer][0, :, step]  # [H, T]
                best = attention.topk(end - first).indices
                for head in range(len(attention)):
                    hits = [column for column in best[head].tolist() if first <= column < end]
                    total[row, head] += float(attention[head, hits].double().sum()) / (end - first)
    return total / calibration.examples


@pytest.fixture
def _all_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers nothing; its attention is as good as any."""
    monkeypatch.setattr(NeedlePrompt, "is_right", lambda self, answer: True)


@pytest.mark.usefixtures("_all_right")
@pytest.mark.parametrize("make", [small_model, small_gemma])
def test_scores_are_those_of_whole_attention_maps(make: Any) -> None:
    model = make()
    layers = [
        index
        for index in range(model.config.num_hidden_layers)
        if getattr(model.config, "layer_types", None) is None or model.config.layer_types[index] == "full_attention"
    ]
    table = calibrate(model, WORDS, FEW)
    assert (table.layers, table.query_heads, table.kv_heads) == (len(layers), 4, 2)
    assert len(layers) == (1 if make is small_gemma else 3)
    assert (table.kind, table.examples, table.answered) == ("r2", 4, 4)
    assert table.fingerprint == fingerprint(model)
    expected = naive_scores(model, WORDS, FEW, layers)
    assert float(expected.min()) > 0
    torch.testing.assert_close(torch.tensor(table.scores, dtype=torch.float64), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("_all_right")
def test_models_of_other_families(tmp_path: Path) -> None:
    """GPT-2 has positions that are learned, and no number of KV heads in its configuration."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=128, n_embd=32, n_layer=2, n_head=4)
    config.update({"bos_token_id": WORDS.bos_token_id, "eos_token_id": WORDS.eos_token_id})
    model = GPT2LMHeadModel(config).eval()
    table = calibrate(model, WORDS, FEW)
    assert (table.layers, table.query_heads, table.kv_heads) == (2, 4, 4)
    save_head_table(table, tmp_path / "heads.json")
    assert head_table_for(model, tmp_path / "heads.json") == table
    expected = naive_scores(model, WORDS, FEW, [0, 1])
    torch.testing.assert_close(torch.tensor(table.scores, dtype=torch.float64), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("_all_right")
def test_nothing_stays_on_the_model() -> None:
    model = small_model().train()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    before = (model.config._attn_implementation, model.config.to_dict())
    ids = torch.randint(4, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    calibrate(model, WORDS, FEW)
    assert model.training
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (model.config._attn_implementation, model.config.to_dict()) == before
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(ZeroDivisionError), watched(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before[0], "also after an error"


def test_only_prompts_that_are_answered_right_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[NeedlePrompt] = []

    def every_other(prompt: NeedlePrompt, answer: str) -> bool:
        tried.append(prompt)
        return len(tried) % 2 == 0

    monkeypatch.setattr(NeedlePrompt, "is_right", every_other)
    found: list[Tensor] = []
    real = WatchedCache.found

    def remember(cache: WatchedCache) -> tuple[Tensor, int]:
        found.append(real(cache)[0])
        return real(cache)

    monkeypatch.setattr(WatchedCache, "found", remember)
    table = calibrate(small_model(), WORDS, FEW)
    assert (table.examples, table.answered) == (4, 2)
    torch.testing.assert_close(torch.tensor(table.scores, dtype=torch.float64), (found[1] + found[3]) / 2)
    assert len({prompt.text for prompt in tried}) == 4


def test_a_model_that_answers_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 4 prompts was answered right.*--length.*--max-new-tokens"):
        calibrate(small_model(), WORDS, FEW, partial=tmp_path / "partial")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_all_right")
def test_a_broken_off_calibration_goes_on(tmp_path: Path) -> None:
    model, partial = small_model(), tmp_path / "partial"
    seen: list[tuple[int, int]] = []

    def break_off(done: int, answered: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, WORDS, FEW, partial=partial, on_example=break_off)
    assert partial.exists()
    with pytest.raises(ValueError, match=r"begun with other settings \(length 90\): repeat them to go on, or delete"):
        calibrate(model, WORDS, Calibration(examples=4, length=91, max_new_tokens=6), partial=partial)
    with pytest.raises(ValueError, match=r"other settings \(fingerprint "):
        calibrate(small_model(seed=1), WORDS, FEW, partial=partial)
    whole = calibrate(model, WORDS, FEW)
    resumed = calibrate(model, WORDS, FEW, partial=partial, on_example=lambda *counts: seen.append(counts))
    assert resumed == whole, "to the last bit"
    assert seen == [(3, 3), (4, 4)]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ('{"format": "other"}', "is no unfinished calibration of this kind"),
        ('{"format": "headkv-mm heads in progress", "settings": {}}', "other settings"),
    ],
)
def test_foreign_files_are_not_gone_on_with(tmp_path: Path, text: str, message: str) -> None:
    partial = tmp_path / "partial"
    partial.write_text(text)
    with pytest.raises(ValueError, match=message):
        calibrate(small_model(), WORDS, FEW, partial=partial)
    assert partial.read_text() == text


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize("length", [250, 700])
def test_prompts_for_any_tokenizer(template: str | None, length: int) -> None:
    tokenizers: list[PreTrainedTokenizerBase] = [byte_tokenizer(template)]
    if template is None:
        tokenizers.append(WORDS)
    for tokenizer in tokenizers:
        for index in range(10):
            prompt = needle_prompt(tokenizer, random.Random(index), length, index / 9)
            assert length * 0.88 - 32 <= len(prompt.ids) <= length
            spanned = tokenizer.decode(prompt.ids[slice(*prompt.span)])
            assert spanned.strip().lower() == prompt.needle.lower()
            assert prompt.needle.endswith(f"is {prompt.right}.")
            assert prompt.text.count(prompt.needle) == 1
            assert f"is {prompt.wrong}." in prompt.text
            assert prompt.wrong != prompt.right
            if template is not None:
                assert prompt.text.startswith("<s><|user|>\n") and prompt.text.endswith("<|assistant|>\n")
                assert prompt.ids[0] == tokenizer.bos_token_id != prompt.ids[1], "the first token comes once"
            else:
                assert prompt.text.endswith("\nAnswer:")


def test_depth_is_where_the_right_answer_lies() -> None:
    places = []
    for depth in (0.0, 0.5, 1.0):
        prompt = needle_prompt(WORDS, random.Random(1), 400, depth)
        places.append(prompt.span[0] / len(prompt.ids))
    assert places[0] < 0.02
    assert 0.35 < places[1] < 0.65
    assert places[2] > 0.85


def test_the_right_answer_can_be_told_from_the_wrong_one() -> None:
    prompt = needle_prompt(WORDS, random.Random(2), 300, 0.3)
    name = prompt.needle.partition(" of the ")[2].partition(" is ")[0]
    asked = prompt.text.partition("of the neighbour of the ")[2].partition("?")[0]
    assert f"The neighbour of the {asked} is the {name}." in prompt.text
    assert prompt.is_right(f"It is {prompt.right}.")
    assert not prompt.is_right(f"It is {prompt.wrong}.")
    assert not prompt.is_right(f"Either {prompt.wrong} or {prompt.right}.")
    assert not prompt.is_right(f"It is {prompt.right}5.")
    assert not prompt.is_right("")


def test_answers_end_with_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without instructions goes on with questions of its own; they are not its answer."""
    tokenizer = byte_tokenizer()
    script = tokenizer("\nIt is 12.\nQuestion: 5", add_special_tokens=False)["input_ids"]

    class Scripted:
        def __init__(self, model: Any, stop: Any) -> None:
            self.steps = 0

        def read(self, cache: Any, tokens: Any, before: Any = None) -> tuple[Tensor, Tensor]:
            self.steps += before is not None
            scores = torch.zeros(1, 400)
            scores[0, script[self.steps - 1]] = 1.0
            return torch.ones(1, 1), scores

    answers: list[str] = []
    monkeypatch.setattr(procedure, "Reader", Scripted)
    monkeypatch.setattr(WatchedCache, "found", lambda self: (torch.ones(3, 4), 2))
    monkeypatch.setattr(NeedlePrompt, "is_right", lambda self, answer: not answers.append(answer))
    calibrate(small_model(), tokenizer, Calibration(examples=1, length=300))
    assert [answer.strip() for answer in answers] == ["It is 12."]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"length": 500}, "made for 512 positions, and prompts of 500 tokens with answers of up to 50 need 550"),
        ({"length": 20}, "prompts of 20 tokens are too short"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(small_model(), WORDS, Calibration(**settings))


def test_models_that_cannot_be_watched_are_refused() -> None:
    cache = WatchedCache(small_model().config)
    with pytest.raises(ValueError, match="cannot be watched"):
        cache.found()
    for heads, layer in zip((4, 4, 2), cache.watched_layers):
        layer.latest, layer.kv_heads = torch.ones(heads), 2
    with pytest.raises(ValueError, match="differ in their number of heads"):
        cache.found()
