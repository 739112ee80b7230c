# SPDX-License-Identifier: Apache-2.0
"""Answers of an evaluation are those that transformers' own generation gives, one document at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.demo.documents import prompt_text, score_answer
from headkv_mm.evaluation.text.answering import Reader, stop_tokens
from headkv_mm.evaluation.text.cells import DEPTHS, CellRunner, cell_documents, document_depth
from headkv_mm.evaluation.text.recording import Recording, replay
from headkv_mm.evaluation.text.settings import Cell, TextSettings
from headkv_mm.evaluation.text.tokens import Encoder, Tokens
from headkv_mm.registry import methods

from .text_model import small_text_model, tokenizer

SETTINGS = TextSettings(documents=3, batch_size=2, lengths=(160,))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_text_model()


def runner(model: Any, **changes: Any) -> CellRunner:
    encoder = Encoder(tokenizer())
    reader = Reader(model, stop_tokens(model, tokenizer()))
    return CellRunner(model, encoder, reader, dataclasses.replace(SETTINGS, **changes))


def generated(model: Any, ids: list[int], limit: int) -> str:
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=limit)
    return Encoder(tokenizer()).decode(output[0, len(ids) :].tolist())


@pytest.mark.parametrize("query_aware", [False, True])
@pytest.mark.parametrize("task", ["single", "multi-value", "two-turn"])
def test_the_full_cache_answers_as_stock_generation_does(model: Any, task: str, query_aware: bool) -> None:
    cell, encoder = Cell(task, 160), Encoder(tokenizer())
    (outcome,) = runner(model, query_aware=query_aware).run(cell, [Compression("none", budget=1.0)])
    documents = cell_documents(cell, SETTINGS, encoder)
    for document, answers, partial in zip(documents, outcome.answers, outcome.partial, strict=True):
        assert len(answers) == len(document.questions)
        for turn, answer in enumerate(answers):
            ids = encoder.document(prompt_text(document, turn, answers[:turn]))
            alone = generated(model, ids, 400)
            # The batch's longest right answer limits all of them.
            assert alone.startswith(answer)
            assert len(encoder.following(answer)) > 8 or answer == alone
        scores = [score_answer(*pair) for pair in zip(document.questions, answers, strict=True)]
        assert partial == sum(scores) / len(scores)


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_budget_of_everything_is_the_full_cache(model: Any, query_aware: bool) -> None:
    compressions = [
        Compression("none", budget=1.0),
        Compression("snapkv", budget=1.0),
        Compression("snapkv", budget=500),
    ]
    full, share, entries = runner(model, query_aware=query_aware).run(Cell("two-turn", 160), compressions)
    assert full.answers == share.answers == entries.answers
    assert share.nbytes["nbytes"] == pytest.approx(full.nbytes["nbytes"], rel=1e-3)


@pytest.mark.parametrize("task", ["multi-key", "two-turn", "long-generation"])
def test_batches_and_other_compressions_change_no_answer(model: Any, task: str) -> None:
    cell = Cell(task, 160)
    several = [
        Compression("streaming", budget=1 / 4),
        Compression("none", budget=1.0),
        Compression("snapkv", budget=1 / 4),
        Compression("h2o", budget=24),
        Compression("fastkv", budget=1 / 8, tsp_least=0),
        Compression("snapkv", budget=300),
    ]
    together = runner(model, batch_size=3).run(cell, several)
    alone = [runner(model, batch_size=1).run(cell, [item])[0] for item in several]
    assert [item.answers for item in together] == [item.answers for item in alone]
    assert together[0].answers != together[2].answers


def test_the_question_is_known_when_it_should_be(model: Any) -> None:
    """A cache of the newest entries alone holds the question if, and only if, it was there before compression."""
    compression = [Compression("streaming", budget=32, sinks=0)]
    cell = Cell("single", 160)
    agnostic, aware = (runner(model, query_aware=aware).run(cell, compression)[0] for aware in (False, True))
    assert agnostic.answers != aware.answers
    assert agnostic.nbytes["nbytes_full"] < aware.nbytes["nbytes_full"]


@torch.no_grad()
def test_where_only_chosen_tokens_go_on_the_model_reads_for_itself(model: Any) -> None:
    compression, encoder, cell = (
        Compression("fastkv", budget=1 / 8, tsp_least=0),
        Encoder(tokenizer()),
        Cell("single", 160),
    )
    (outcome,) = runner(model).run(cell, [compression])
    for document, (answer,) in zip(cell_documents(cell, SETTINGS, encoder), outcome.answers, strict=True):
        read = torch.tensor([encoder.document(document.text)])
        cache = HeadKVCache(model, compression)
        model(read, past_key_values=cache)
        asked = torch.tensor([encoder.following(prompt_text(document, 0, []).removeprefix(document.text))])
        ids = torch.cat([read, asked], 1)
        grown = cache.copy(evict=False)
        output = model.generate(ids, past_key_values=grown, do_sample=False, max_new_tokens=400)
        assert encoder.decode(output[0, ids.shape[1] :].tolist()).startswith(answer)
        assert answer
    tokens = Tokens(read, torch.ones_like(read))
    recording = Recording(model)
    Reader(model, [2]).read(recording, tokens)
    with pytest.raises(RuntimeError, match="not hooked up to this cache"):
        replay(recording, HeadKVCache(model, compression))


@pytest.mark.parametrize("method", [name for name in methods("text") if name not in ("none", "fastkv")])
def test_a_replayed_prompt_is_a_read_prompt(model: Any, method: str) -> None:
    rows = [torch.randint(5, 400, (count,)).tolist() for count in (70, 48)]
    tokens = Tokens.padded(rows, tokenizer().pad_token_id, model.device)
    reader, recording = Reader(model, [2]), Recording(model)
    mask, recorded_scores = reader.read(recording, tokens)
    options: dict[str, Any] = {"interval": 4}
    if method == "headkv-r2":
        options["scores"] = ((3.0, 1.0), (1.0, 2.0))
    if method == "compresskv":
        heads = model.config.num_attention_heads
        options |= {"head_scores": [list(range(heads))] * 2, "layer_errors": [1.0, 3.0], "least": 8}
    if method == "compilerkv":
        options |= {"head_weights": ((1.0, 1.5), (0.8, 1.0)), "gate": (((0.0, 0.9),),) * 2}
    # What another budget has left behind must not matter.
    replay(recording, HeadKVCache(model, method, budget=1 / 3, **options))
    direct, shown = (HeadKVCache(model, method, budget=1 / 4, **options) for _ in range(2))
    _, scores = reader.read(direct, tokens)
    replay(recording, shown)
    assert torch.equal(scores, recorded_scores)
    for layer in range(len(direct)):
        for ours, theirs in zip(shown.kept_positions(layer), direct.kept_positions(layer), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (shown.nbytes, shown.nbytes_peak, shown.nbytes_full) == (
        direct.nbytes,
        direct.nbytes_peak,
        direct.nbytes_full,
    )
    for length in (5, *[1] * 6):
        more = Tokens(torch.randint(5, 400, (2, length)), torch.ones(2, length, dtype=torch.long))
        after, ours = reader.read(shown, more, mask)
        mask, theirs = reader.read(direct, more, mask)
        assert torch.equal(ours, theirs)
        assert torch.equal(after, mask)


def test_a_recording_takes_one_prompt(model: Any) -> None:
    reader, recording = Reader(model, [2]), Recording(model)
    with pytest.raises(RuntimeError, match="read a prompt"):
        replay(recording, HeadKVCache(model, "snapkv"))
    tokens = Tokens.padded([[1, 5, 6]], 0, model.device)
    mask, _ = reader.read(recording, tokens)
    with pytest.raises(RuntimeError, match="one prompt"):
        reader.read(recording, tokens, mask)


def test_a_long_answer_stays_within_the_budget(model: Any) -> None:
    compressions = [Compression("none", budget=1.0), Compression("streaming", budget=24, interval=16)]
    full, small = runner(model, documents=2).run(Cell("long-generation", 400), compressions)
    entry = 2 * 2 * 2 * 8 * 4  # layers, KV heads, keys and values, size, bytes
    # Positions and the like come on top of 24 entries and room for 16 more in both rows.
    assert 2 * entry * (24 + 16) <= small.ends["nbytes"] < 2 * entry * (24 + 16) * 1.3
    assert small.ends["nbytes"] < full.ends["nbytes"] / 4
    assert full.ends["nbytes"] > full.nbytes["nbytes"]


def test_documents_depend_on_their_number_only() -> None:
    encoder, cell = Encoder(tokenizer()), Cell("single", 256)
    few = cell_documents(cell, dataclasses.replace(SETTINGS, documents=2), encoder)
    many = cell_documents(cell, dataclasses.replace(SETTINGS, documents=4), encoder)
    assert many[:2] == few
    assert len({document.text for document in many}) == 4
    other = cell_documents(cell, dataclasses.replace(SETTINGS, documents=2, seed=1), encoder)
    assert {document.text for document in other}.isdisjoint(document.text for document in many)


def test_needles_lie_at_every_depth_in_turn() -> None:
    encoder, cell = Encoder(tokenizer()), Cell("single", 256)
    for index, document in enumerate(cell_documents(cell, dataclasses.replace(SETTINGS, documents=6), encoder)):
        depth = document_depth(cell, index)
        assert depth == DEPTHS[index % len(DEPTHS)]
        place = document.text.index(document.questions[0].evidence[0]) / len(document.text)
        assert place == pytest.approx(depth, abs=0.12)
    assert document_depth(Cell("list", 256), 0) is None


def test_answers_end_where_they_should(model: Any) -> None:
    class Script:
        """Stands for a model: the next token is the one after, and 9 ends an answer."""

        device = torch.device("cpu")

        def forward(self, **inputs: Any) -> None: ...

        def __call__(self, *, input_ids: Any, **inputs: Any) -> Any:
            scores = torch.nn.functional.one_hot(input_ids + 1, 20).float()
            return type("Output", (), {"logits": scores})

    reader = Reader(Script(), [9])
    scores = torch.nn.functional.one_hot(torch.tensor([6, 9, 2]), 20).float()
    assert reader.answer(None, torch.ones(3, 1), scores, 5) == [[6, 7, 8], [], [2, 3, 4, 5, 6]]
    assert reader.answer(None, torch.ones(3, 1), scores, 20) == [[6, 7, 8], [], [2, 3, 4, 5, 6, 7, 8]]

    class Parts:
        def __init__(self) -> None:
            self.kept: list[list[int]] = []

        def keep_parts(self, parts: list[int]) -> None:
            self.kept.append(parts)

    # Three parts of two rows: the second ends at once, the first after two more tokens.
    cache = Parts()
    scores = torch.nn.functional.one_hot(torch.tensor([7, 9, 9, 9, 9, 4]), 20).float()
    answers = reader.answer(cache, torch.ones(6, 1), scores, 20, parts=3)
    assert answers == [[7, 8], [], [], [], [], [4, 5, 6, 7, 8]]
    assert cache.kept == [[0, 2], [1]]


def test_special_tokens_stand_where_they_belong() -> None:
    encoder, words = Encoder(tokenizer()), tokenizer()
    assert encoder.document("The code")[0] == words.bos_token_id
    assert encoder.following("the code") == encoder.document("the code")[1:]
    assert words.eos_token_id not in encoder.document("The code")
    assert encoder.decode([*encoder.following("the code is 12"), words.eos_token_id]) == "the code is 12"
    padded = Tokens.padded([[1, 2, 3], [4]], 0, torch.device("cpu"))
    assert padded.ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert padded.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Encoder(Endless())
