# SPDX-License-Identifier: Apache-2.0
"""The LlamaGen model: positions, padding, cached generation, guidance, seeds, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoTokenizer, LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

from headkv_mm.demo.tokenizer import build_tokenizer
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration, register
from headkv_mm.llamagen.positions import AxialRotaryEmbedding, LearnedPositions
from headkv_mm.llamagen.sampling import draw, uniform_streams

CODES, PROMPT, HEIGHT, WIDTH = 20, 6, 4, 3
STEPS = HEIGHT * WIDTH
PAD, NULL, BOS, BOI = 20, 21, 22, 23
PROMPTS = torch.tensor([[PAD, PAD, BOS, 25, 26, BOI], [BOS, 24, 25, 26, 27, BOI], [PAD, PAD, PAD, BOS, 24, BOI]])
MASK = (PROMPTS != PAD).long()


def make_config(**changes: Any) -> LlamaGenConfig:
    text = {
        "model_type": "llama",
        "vocab_size": CODES + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    settings = {
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "codebook_size": CODES,
        "max_prompt_length": PROMPT,
        "patch_size": 2,
        "learned_positions": True,
        "pad_token_id": PAD,
        "null_token_id": NULL,
        "bos_token_id": BOS,
        "boi_token_id": BOI,
    }
    return LlamaGenConfig(text_config={**text, **changes.pop("text_config", {})}, **{**settings, **changes})


@pytest.fixture(scope="module")
def model() -> LlamaGenForConditionalGeneration:
    torch.manual_seed(0)
    model = LlamaGenForConditionalGeneration(make_config())
    model.eval()
    for parameter in model.parameters():  # large enough weights that every input matters
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.patch_decoder is not None
    model.patch_decoder.codebook.random_(0, 256)
    return model


@torch.no_grad()
def teacher_forced(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Scores [B, STEPS, CODES] of every image token in one pass without a cache."""
    ids = torch.cat((prompts, tokens[:, :-1]), dim=1)
    full = torch.cat((mask, torch.ones_like(tokens[:, :-1])), dim=1)
    logits: torch.Tensor = model(ids, attention_mask=full, use_cache=False).logits
    return logits[:, PROMPT - 1 :]


def test_cached_generation_equals_teacher_forcing(model: LlamaGenForConditionalGeneration) -> None:
    tokens = model.generate(PROMPTS, MASK, do_sample=False)
    assert tokens.shape == (3, STEPS)
    assert torch.equal(tokens, teacher_forced(model, PROMPTS, MASK, tokens).argmax(-1))


def test_sampling_draws_from_the_teacher_forced_distribution(model: LlamaGenForConditionalGeneration) -> None:
    seeds = [5, 6, 7]
    tokens = model.generate(PROMPTS, MASK, do_sample=True, temperature=0.8, top_k=7, seeds=seeds)
    scores = teacher_forced(model, PROMPTS, MASK, tokens) / 0.8
    scores = scores.masked_fill(scores < scores.topk(7, dim=-1).values[..., -1:], -torch.inf)
    uniform = uniform_streams(3, STEPS, seeds, None)
    expected = torch.stack([draw(scores[:, step], uniform[:, step]) for step in range(STEPS)], dim=1)
    assert torch.equal(tokens, expected)


def test_top_p_keeps_the_smallest_set(model: LlamaGenForConditionalGeneration) -> None:
    tokens = model.generate(PROMPTS, MASK, do_sample=True, top_p=1e-6, seeds=[1, 2, 3])
    assert torch.equal(tokens, model.generate(PROMPTS, MASK, do_sample=False))


def test_guidance_mixes_conditional_and_unconditional_scores(model: LlamaGenForConditionalGeneration) -> None:
    tokens = model.generate(PROMPTS, MASK, do_sample=False, guidance_scale=2.5)
    null = torch.tensor([[PAD, PAD, PAD, BOS, NULL, BOI]]).expand(3, -1)
    conditional = teacher_forced(model, PROMPTS, MASK, tokens)
    unconditional = teacher_forced(model, null, (null != PAD).long(), tokens)
    assert torch.equal(tokens, (unconditional + 2.5 * (conditional - unconditional)).argmax(-1))
    assert not torch.equal(tokens, model.generate(PROMPTS, MASK, do_sample=False))
    explicit = model.generate(PROMPTS, MASK, do_sample=False, guidance_scale=2.5, negative_prompt_ids=null[:1])
    assert torch.equal(tokens, explicit)


def test_negative_prompts_per_image(model: LlamaGenForConditionalGeneration) -> None:
    tokens = model.generate(
        PROMPTS, MASK, do_sample=False, guidance_scale=2.0, negative_prompt_ids=PROMPTS.flip(0).contiguous()
    )
    conditional = teacher_forced(model, PROMPTS, MASK, tokens)
    negative = teacher_forced(model, PROMPTS.flip(0), MASK.flip(0), tokens)
    assert torch.equal(tokens, (2 * conditional - negative).argmax(-1))


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_an_image_is_the_same_alone_and_in_any_batch(model: LlamaGenForConditionalGeneration, guidance: float) -> None:
    seeds = [11, 12, 13]
    together = model.generate(PROMPTS, MASK, do_sample=True, seeds=seeds, guidance_scale=guidance)
    for row in range(3):
        alone = model.generate(
            PROMPTS[row : row + 1], MASK[row : row + 1], do_sample=True, seeds=seeds[row : row + 1],
            guidance_scale=guidance,
        )  # fmt: skip
        assert torch.equal(alone[0], together[row])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(
        together, model.generate(PROMPTS, MASK, do_sample=True, generator=generators, guidance_scale=guidance)
    )
    assert not torch.equal(
        together, model.generate(PROMPTS, MASK, do_sample=True, seeds=[21, 22, 23], guidance_scale=guidance)
    )


def test_without_seeds_the_global_stream_decides(model: LlamaGenForConditionalGeneration) -> None:
    torch.manual_seed(3)
    first = model.generate(PROMPTS, MASK, do_sample=True)
    second = model.generate(PROMPTS, MASK, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(PROMPTS, MASK, do_sample=True))
    assert not torch.equal(first, second)


def test_unpadded_prompts_with_explicit_positions_match(model: LlamaGenForConditionalGeneration) -> None:
    tokens = torch.randint(CODES, (1, STEPS))
    padded = teacher_forced(model, PROMPTS[:1], MASK[:1], tokens)
    ids = torch.cat((PROMPTS[:1, 2:], tokens[:, :-1]), dim=1)
    positions = torch.arange(2, PROMPT + STEPS - 1)[None]
    with torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=False, logits_to_keep=STEPS).logits
    torch.testing.assert_close(logits, padded, rtol=1e-4, atol=1e-4)


def test_labels_give_the_mean_cross_entropy(model: LlamaGenForConditionalGeneration) -> None:
    tokens = torch.randint(CODES, (3, STEPS))
    ids = torch.cat((PROMPTS, tokens), dim=1)
    mask = torch.cat((MASK, torch.ones_like(tokens)), dim=1)
    labels = torch.cat((torch.full_like(PROMPTS, -100), tokens), dim=1)
    with torch.no_grad():
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    logits = teacher_forced(model, PROMPTS, MASK, tokens)
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="labels must be image codes"):
        model(ids, attention_mask=mask, labels=ids)
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, attention_mask=mask, labels=labels, logits_to_keep=1)


def test_rotary_angles_by_row_and_column() -> None:
    rotary = AxialRotaryEmbedding(make_config())
    positions = torch.tensor([[0, 2, PROMPT - 1, PROMPT, PROMPT + 1, PROMPT + WIDTH]])
    cosines, sines = rotary(torch.empty(0), positions)
    assert cosines.shape == (1, 6, 8)
    angles = torch.atan2(sines, cosines)[0, :, [0, 2]]  # frequency 1 of the row, of the column
    expected = torch.tensor([[0, 0], [2, 2], [5, 5], [6, 6], [6, 7], [7, 6]], dtype=torch.float32)
    torch.testing.assert_close(angles, torch.atan2(expected.sin(), expected.cos()))
    assert not list(rotary.buffers())


def test_learned_positions_name_the_next_cell() -> None:
    positions = LearnedPositions(make_config())
    last = PROMPT + STEPS - 1
    embedded = positions(torch.tensor([[1, PROMPT - 1, PROMPT + WIDTH - 1, last]]))[0]
    rows, columns, slots = positions.rows.weight, positions.columns.weight, positions.slots.weight
    torch.testing.assert_close(embedded[0], slots[1])
    torch.testing.assert_close(embedded[1], slots[PROMPT - 1] + rows[0] + columns[0])
    torch.testing.assert_close(embedded[2], rows[1] + columns[0])
    torch.testing.assert_close(embedded[3], rows[HEIGHT] + columns[0])


def test_cache_choice(model: LlamaGenForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(PROMPTS, MASK, do_sample=False)
    calls: list[dict[str, Any]] = []
    made = DynamicCache(config=model.config.get_text_config())

    def prepare(**arguments: Any) -> DynamicCache:
        calls.append(arguments)
        return made

    monkeypatch.setattr(model, "_prepare_static_cache", prepare)
    assert torch.equal(model.generate(PROMPTS, MASK, do_sample=False), expected)
    assert made.get_seq_length() == PROMPT + STEPS - 1
    assert calls[0]["batch_size"] == 3
    assert calls[0]["max_cache_len"] == PROMPT + STEPS
    own = DynamicCache(config=model.config.get_text_config())
    assert torch.equal(model.generate(PROMPTS, MASK, do_sample=False, past_key_values=own), expected)
    assert own.get_seq_length() == PROMPT + STEPS - 1
    assert len(calls) == 1
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        model.generate(PROMPTS, MASK, past_key_values=own)


def test_callback_and_logits_processor(model: LlamaGenForConditionalGeneration) -> None:
    class OnlyCodeThree(LogitsProcessor):
        lengths: list[int] = []  # noqa: RUF012 (a record of one test)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([3]), 0.0)

    processor, progress = OnlyCodeThree(), []
    tokens = model.generate(
        PROMPTS, MASK, do_sample=True, logits_processor=LogitsProcessorList([processor]),
        callback=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert bool((tokens == 3).all())
    assert processor.lengths == list(range(STEPS))
    assert progress == [(step + 1, STEPS) for step in range(STEPS)]


def test_the_backbone_uses_the_attention_interface(model: LlamaGenForConditionalGeneration) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[int] = []

    def counting(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        seen.append(int(module.layer_idx))  # type: ignore[arg-type]
        return sdpa_attention_forward(module, *arguments, **keywords)

    AttentionInterface.register("sdpa_counting_test", counting)
    expected = model(PROMPTS, attention_mask=MASK[:, :PROMPT] * 0 + 1).logits
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa_counting_test")
    try:
        logits = model(PROMPTS).logits
    finally:
        model.set_attn_implementation(before)
    assert seen == [0, 1]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": PROMPTS[:, 1:]}, "pad them on the left"),
        ({"input_ids": PROMPTS[0]}, "pad them on the left"),
        ({"input_ids": PROMPTS + 10}, r"prompt ids must be in 0\.\.29"),
        ({"attention_mask": MASK[:, 1:]}, "must have the prompts' shape"),
        ({"attention_mask": MASK.flip(1)}, "padded on the left"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"negative_prompt_ids": PROMPTS[:1]}, "no effect without guidance"),
        ({"negative_prompt_ids": PROMPTS[:2], "guidance_scale": 2.0}, "expected 1 or 3 negative prompts"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"seeds": [1, 2]}, "one seed or generator per image"),
        ({"seeds": [1, 2, 3], "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_input_of_generate(
    model: LlamaGenForConditionalGeneration, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": PROMPTS, "attention_mask": MASK, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_height": 0}, "image_height must be at least 1"),
        ({"patch_size": 0}, "patch_size"),
        ({"codebook_size": 30}, "must exceed codebook_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"text_config": {"model_type": "gpt2", "n_head": 4}}, "must be a LlamaConfig"),
        ({"text_config": {"head_dim": 6}}, "multiple of 4"),
        ({"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}, "'default'"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_pixels(model: LlamaGenForConditionalGeneration) -> None:
    tokens = torch.arange(STEPS)[None].repeat(2, 1)
    pixels = model.decode_image_tokens(tokens)
    assert pixels.shape == (2, HEIGHT * 2, WIDTH * 2, 3)
    assert pixels.dtype == torch.uint8
    assert model.patch_decoder is not None
    assert torch.equal(pixels[1, 2:4, 4:6], model.patch_decoder.codebook[1 * WIDTH + 2])
    with pytest.raises(ValueError, match="shape"):
        model.decode_image_tokens(tokens[:, 1:])
    with pytest.raises(ValueError, match=r"must be in 0\.\.19"):
        model.decode_image_tokens(tokens + CODES)
    with pytest.raises(ValueError, match="no pixel codebook"):
        LlamaGenForConditionalGeneration(make_config(patch_size=None)).decode_image_tokens(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_through_the_auto_classes(
    model: LlamaGenForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    register()
    register()
    model.save_pretrained(tmp_path)
    build_tokenizer(CODES).save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(loaded) is LlamaGenForConditionalGeneration
    assert isinstance(loaded.config.get_text_config(), LlamaConfig)
    assert loaded.dtype == dtype
    assert loaded.patch_decoder.codebook.dtype == torch.uint8  # type: ignore[union-attr]
    assert torch.equal(loaded.patch_decoder.codebook, model.patch_decoder.codebook)  # type: ignore[union-attr]
    if dtype == torch.float32:
        expected = model.generate(PROMPTS, MASK, do_sample=False)
        assert torch.equal(loaded.generate(PROMPTS, MASK, do_sample=False), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left"
    text = "red ring top on white"
    assert tokenizer(text)["input_ids"] == build_tokenizer(CODES)(text)["input_ids"]
    assert AutoConfig.from_pretrained(tmp_path).num_image_tokens == STEPS


def test_from_config_initialises_everything() -> None:
    made = AutoModelForMultimodalLM.from_config(make_config())
    assert 0.015 < made.lm_head.weight.std().item() < 0.025
    assert 0.015 < made.model.positions.rows.weight.std().item() < 0.025
    assert made.patch_decoder.codebook.max().item() == 0


def llamagen_xl(**text: Any) -> LlamaGenConfig:
    sizes = {
        "model_type": "llama",
        "vocab_size": 16384 + 1000,
        "hidden_size": 1280,
        "intermediate_size": 3584,
        "num_hidden_layers": 36,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
    }
    return LlamaGenConfig(text_config={**sizes, **text})


def test_llamagen_xl_sizes_build() -> None:
    with torch.device("meta"):
        model = LlamaGenForConditionalGeneration(llamagen_xl())
        mask = torch.zeros(2, 1, 120, 120)  # ready-made: checking a mask needs values, and these tensors have none
        logits = model(torch.zeros(2, 120, dtype=torch.long), attention_mask=mask, use_cache=False).logits
    assert logits.shape == (2, 120, 16384)
    blocks = sum(item.numel() for item in model.model.language_model.layers.parameters())
    assert blocks == 36 * (4 * 1280**2 + 3 * 1280 * 3584 + 2 * 1280)
    assert model.model.positions is None
    assert model.config.num_image_tokens == 576


def test_a_narrow_llamagen_with_the_real_grid_runs() -> None:
    config = llamagen_xl(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaGenForConditionalGeneration(config).eval()
    prompts = torch.randint(16384, 17000, (1, 120))
    tokens = model.generate(prompts, do_sample=True, seeds=[0])
    assert tokens.shape == (1, 576)
    with pytest.raises(ValueError, match="guidance needs negative_prompt_ids"):
        model.generate(prompts, guidance_scale=2.0)


def test_draw_follows_the_distribution() -> None:
    scores = torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf]).expand(20_000, -1)
    codes = draw(scores, uniform_streams(1, 20_000, [0], None)[0])
    shares = torch.bincount(codes, minlength=5) / len(codes)
    torch.testing.assert_close(shares, scores[0].softmax(-1), rtol=0, atol=0.015)
    assert shares[1] == shares[4] == 0
    edge = draw(scores[:1], torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert edge.item() == 3
    assert draw(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1, dtype=torch.float64)).item() == 1
