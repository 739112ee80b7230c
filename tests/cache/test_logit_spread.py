# SPDX-License-Identifier: Apache-2.0
"""`LogitSpread` against its definition over stored queries, in float64: squares and means must be of the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headkv_mm import HeadKVCache, ImageGrid, plan_memory
from headkv_mm.allocators import Uniform
from headkv_mm.asked import Asked
from headkv_mm.budgets import ImagePlan, image_plan
from headkv_mm.compressor import LayerCompressor
from headkv_mm.image_compressor import ImageCompressor
from headkv_mm.pieces import Observed
from headkv_mm.ragged import RaggedKV
from headkv_mm.registry import Pieces, get_method
from headkv_mm.schedules import EachRow
from headkv_mm.scorers import LogitSpread
from headkv_mm.squared_logits import squared_logits
from headkv_mm.text_compressor import TextCompressor
from headkv_mm.text_plan import TextPlan

from .test_text_cache import carry_on

KV_HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 8, 0.6
GRID = ImageGrid(6, 5, row_stride=6, start=1)


@dataclass(frozen=True)
class Watched(LogitSpread):
    """Notes what it was asked, and what it said."""

    seen: list[tuple[Observed, Tensor]] = field(default_factory=list, compare=False)

    def score_entries(self, observed: Observed) -> Tensor:
        scores = super().score_entries(observed)
        copied = replace(observed, store=observed.store.copy(), seen=observed.seen.clone())
        self.seen.append((copied, scores.clone()))
        return scores


class Rows:
    """Random tokens of a batch. Every row remembers its queries by position: [H, D] each."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.queries: list[list[Tensor]] = [[] for _ in range(rows)]

    def draw(self, heads: int, tokens: int) -> Tensor:
        # A part that all have in common, so that the mean is no small part of the square.
        return torch.randn(len(self.queries), heads, tokens, HEAD_DIM, generator=self.generator) + 0.7

    def next(self, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of as many tokens as `visible` [B, T] has columns; NaN where there is padding."""
        query, key, value = (self.draw(heads, visible.shape[1]) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
        for row, own in enumerate(self.queries):
            own += [query[row, :, column] for column in visible[row].nonzero()[:, 0].tolist()]
        for tensor in (query, key, value):
            tensor.masked_fill_(~visible[:, None, :, None], float("nan"))
        return query, key, value

    def decode(self, compressor: LayerCompressor) -> None:
        visible = torch.ones(len(self.queries), 1, dtype=torch.bool)
        compressor.decode(*self.next(visible), scale=SCALE)

    def append(self, compressor: LayerCompressor, visible: Tensor) -> None:
        query, key, value = self.next(visible)
        # The model gives padding some finite query.
        compressor.append(query.nan_to_num(9.0), key, value, visible, scale=SCALE)

    def take(self, rows: list[int]) -> None:
        self.queries = [list(self.queries[row]) for row in rows]


def padded(lengths: list[int]) -> Tensor:
    """[B, T] bool, padding at the left."""
    longest = max(lengths)
    return torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]


def image(rows: Rows, scorer: LogitSpread, lengths: list[int], first: int | None = None) -> ImageCompressor:
    pieces = replace(get_method("logit-spread").image, scorer=scorer, schedule=EachRow(first))  # type: ignore[type-var]
    visible = padded(lengths)
    _, keys, values = rows.next(visible)
    return ImageCompressor(pieces, image_plan(10, GRID), keys, values, visible, lengths)


def text(rows: Rows, scorer: LogitSpread, lengths: list[int], plan: TextPlan, window: int = 32) -> TextCompressor:
    pieces = replace(get_method("logit-spread").text, scorer=scorer, allocator=Uniform(window=window))  # type: ignore[type-var]
    visible = padded(lengths)
    query, keys, values = rows.next(visible)
    padding = (~visible).sum(-1, dtype=torch.int32)
    positions = torch.where(visible, visible.cumsum(-1) - 1, -1).to(torch.int32)
    asked = Asked(query.nan_to_num(9.0).transpose(1, 2), positions, SCALE)
    return TextCompressor(pieces, plan, keys, values, padding, lengths, asked)


def spread(key: Tensor, queries: list[Tensor], value: Tensor | None) -> float:
    """The definition: variance over the queries [H', D], its mean over them, the root; times the size of the value."""
    logits = torch.stack(queries).double() @ key.double() * SCALE  # [Q, R]
    size = 1.0 if value is None else float(value.double().norm())
    return float(logits.var(0, correction=0).mean().sqrt()) * size


def check(watched: Watched, rows: Rows, counts: Callable[[int], int]) -> None:
    """What was said last, for every region: by the definition, or the largest where not all queries saw the entry."""
    observed, scores = watched.seen[-1]
    store = observed.store
    for row, own in enumerate(rows.queries):
        assert int(observed.seen[row]) == len(own)
        count = counts(row)
        first = len(own) - count
        for head in range(KV_HEADS):
            begin, length = int(store.start[row, head]), int(store.length[row, head])
            group = [query[head * GROUP : (head + 1) * GROUP] for query in own[first:]]
            found = {int(store.positions[slot]): float(scores[slot]) for slot in range(begin, begin + length)}
            expected = {
                int(store.positions[slot]): spread(
                    store.keys[slot], group, store.values[slot] if watched.by_value else None
                )
                for slot in range(begin, begin + length)
            }
            if observed.added_up is not None:
                largest = max((score for position, score in expected.items() if position <= first), default=0.0)
                expected = {position: score if position <= first else largest for position, score in expected.items()}
                assert len([position for position in expected if position > first]) == count - 1
            assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("first", [None, 1, 4])
def test_every_eviction_of_an_image(first: int | None) -> None:
    rows, scorer = Rows(3), Watched()
    compressor = image(rows, scorer, [3, 1, 6], first)
    evictions = 0
    for _ in range(GRID.start + GRID.tokens):
        rows.decode(compressor)
        assert compressor.observer.queries is None  # none is held
        if len(scorer.seen) > evictions:
            evictions += 1
            check(scorer, rows, lambda row: GRID.row_stride)
    assert evictions == {None: 5, 1: 6, 4: 3}[first]


def test_fewer_queries_than_a_row() -> None:
    rows, scorer = Rows(2), Watched(queries=4)
    compressor = image(rows, scorer, [3, 5])
    for _ in range(GRID.start + 3 * GRID.row_stride):
        rows.decode(compressor)
    assert len(scorer.seen) == 2
    check(scorer, rows, lambda row: 4)


def test_chunks_of_an_image_add_what_their_tokens_would() -> None:
    """Some outside the last row, one with padding, one over the end of a row."""
    rows, scorer = Rows(2), Watched()
    compressor = image(rows, scorer, [3, 5])
    rows.append(compressor, torch.ones(2, 4, dtype=torch.bool))  # the prompt's: nothing is added up
    rows.decode(compressor)
    rows.append(compressor, torch.ones(2, 8, dtype=torch.bool))  # 2 of these are of the second row
    rows.decode(compressor)
    assert not scorer.seen
    visible = torch.tensor([[True, True, True], [False, True, False]])
    rows.append(compressor, visible)
    check(scorer, rows, lambda row: 6 if row == 0 else 4)
    rows.decode(compressor)
    rows.append(compressor, torch.ones(2, 9, dtype=torch.bool))  # a row and a half: its last six
    assert len(scorer.seen) == 2
    observed, _ = scorer.seen[-1]
    assert observed.query_counts == [6, 6]
    check(scorer, rows, lambda row: 6)


def test_rows_taken_in_the_middle_of_a_row() -> None:
    rows, scorer = Rows(3), Watched()
    compressor = image(rows, scorer, [3, 1, 6])
    for _ in range(GRID.start + 2 * GRID.row_stride + 3):
        rows.decode(compressor)
    compressor.select_rows(torch.tensor([2, 0, 2, 1]))
    rows.take([2, 0, 2, 1])
    for _ in range(3):
        rows.decode(compressor)
    assert len(scorer.seen) == 2
    check(scorer, rows, lambda row: GRID.row_stride)


def test_after_a_crop_what_was_added_up_starts_anew() -> None:
    rows, scorer = Rows(2), Watched()
    compressor = image(rows, scorer, [3, 5])
    for _ in range(GRID.start + 2 * GRID.row_stride - 2):
        rows.decode(compressor)
    compressor.crop(2)
    rows.queries = [own[:-2] for own in rows.queries]
    for _ in range(4):
        rows.decode(compressor)
    check(scorer, rows, lambda row: 4)


@pytest.mark.parametrize("budget", [80, 0.5])
def test_texts(budget: float | int) -> None:
    """At the end of the prompt from its last queries; then from sums, over no more than the window."""
    rows, scorer = Rows(2), Watched()
    compressor = text(rows, scorer, [120, 90], TextPlan(budget, interval=40))
    check(scorer, rows, lambda row: 32)
    assert scorer.seen[-1][0].added_up is None
    for evictions in range(2, 5):
        for _ in range(40):
            assert len(scorer.seen) == evictions - 1
            rows.decode(compressor)
        check(scorer, rows, lambda row: 32)
    rows.append(compressor, torch.ones(2, 35, dtype=torch.bool))
    check(scorer, rows, lambda row: 32)
    assert scorer.seen[-1][0].added_up is None


def test_a_text_that_only_grows_over_its_budget_while_decoding() -> None:
    rows, scorer = Rows(2), Watched()
    compressor = text(rows, scorer, [30, 12], TextPlan(50, interval=16))
    for _ in range(32):
        rows.decode(compressor)
    assert len(scorer.seen) == 1
    check(scorer, rows, lambda row: 16)


def test_what_was_not_seen_by_all_queries_leaves_last() -> None:
    """With a window of 4 and 16 queries, 12 entries could leave that were not asked for by all of these."""
    rows, scorer = Rows(1), Watched()
    compressor = text(rows, scorer, [60], TextPlan(40, interval=16), window=4)
    for _ in range(16):
        rows.decode(compressor)
    check(scorer, rows, lambda row: 16)
    kept = compressor.store.kept_positions()[0]
    assert all(set(range(61, 76)) <= set(own.tolist()) for own in kept)


def observed_sums(keys: Tensor, queries: Tensor) -> Observed:
    """One row, one head: keys [T, D] of an image, and what queries [Q, D] that came after left."""
    count, tokens = len(queries), len(keys)
    store = RaggedKV.over(keys[None, None], keys[None, None], torch.zeros(1, dtype=torch.int32), with_mass=True)
    assert store.mass is not None
    seen = torch.tensor([tokens - 1 + count], dtype=torch.int32)
    positions = torch.arange(tokens - 1, tokens - 1 + count, dtype=torch.int32)[None]
    for index in range(count):
        one = queries[None, index : index + 1, None]
        store.mass += squared_logits(one, positions[:, index : index + 1], store, scale=1.0)
    return Observed(
        store=store,
        plan=ImagePlan(tokens=256, row=16, budget=32),
        condition=torch.zeros(1, dtype=torch.int32),
        seen=seen,
        scale=1.0,
        row_budgets=[32],
        row_seen=seen.tolist(),
        mean_query=queries.mean(0)[None, None],
        query_counts=[count],
        added_up=store.mass,
    )


@pytest.mark.parametrize("common, tolerance", [(0.0, 1e-5), (30.0, 0.01), (100.0, 0.05)])
def test_large_common_logits_do_not_hide_the_spread(common: float, tolerance: float) -> None:
    """Logits of mean `common` and spread 0.5 in float32, over 64 queries."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.zeros(40, 16), torch.randn(64, 16, generator=generator)
    keys[:, 0], queries[:, 0] = 1.0, common
    keys[:, 1:] = 0.5 * torch.nn.functional.normalize(torch.randn(40, 15, generator=generator), dim=-1)
    found = LogitSpread(by_value=False).score_entries(observed_sums(keys, queries))
    logits = queries.double() @ keys.double().T
    expected = logits.std(0, correction=0)
    assert expected.min() > 0.3
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0.0)


def test_no_spread_is_zero_and_never_nan() -> None:
    keys = 3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(16, 16)
    found = LogitSpread().score_entries(observed_sums(keys, queries))
    sizes = keys.norm(dim=-1).square() * queries[0].norm()  # the values are the keys
    assert (found >= 0).all()
    assert (found <= 1e-3 * sizes + 1e-6).all()


@pytest.mark.parametrize("settings", [{"budget": 24}, {"budget": 0.4}], ids=str)
def test_saved_between_two_evictions_it_goes_on_as_before(model: Any, tmp_path: Any, settings: dict[str, Any]) -> None:
    ids, mask = torch.randint(6, 120, (2, 100), generator=torch.Generator().manual_seed(3)), torch.ones(2, 100).long()
    cache = HeadKVCache(model, "logit-spread", **settings)
    carry_on(model, cache, ids[:, :50], mask[:, :50])
    steps = [(index, index + 1) for index in range(50, 90)]
    for first, last in steps[:22]:
        carry_on(model, cache, ids[:, first:last], mask[:, :last])
    cache.save(tmp_path / "text.kv", model)
    loaded = HeadKVCache.load(tmp_path / "text.kv", model)
    for first, last in steps[22:]:
        expected = carry_on(model, cache, ids[:, first:last], mask[:, :last])
        assert torch.equal(carry_on(model, loaded, ids[:, first:last], mask[:, :last]), expected)


def test_bytes_are_those_of_snapkv_and_a_mean_query(model: Any) -> None:
    """4 bytes per entry as `snapkv`, and float32 numbers of one query per layer and row, whatever the row's length."""
    queries = 2 * 3 * 8 * 8 * 4  # layers, rows, heads, their size, bytes
    plans = [
        plan_memory(model, method, budget=16, rows=3, condition=20, image_grid=ImageGrid(8, 8))
        for method in ("snapkv", "logit-spread")
    ]
    assert plans[1].nbytes == plans[0].nbytes
    assert plans[1].bookkeeping == plans[0].bookkeeping + queries
    held = []
    for method in ("snapkv", "logit-spread"):
        cache = HeadKVCache(model, method, budget=16, image_grid=ImageGrid(8, 8))
        ids, mask = torch.full((3, 44), 7), torch.ones(3, 44, dtype=torch.long)
        carry_on(model, cache, ids[:, :20], mask[:, :20])
        for last in range(21, 45):  # first full after two rows; nothing gets larger then
            carry_on(model, cache, ids[:, last - 1 : last], mask[:, :last])
        held.append(cache.nbytes)
        assert cache.nbytes_peak <= plans[len(held) - 1].nbytes_peak
    unused = 2 * 3 * (4 + 2)  # a plan reckons with padding and head types
    assert held == [plan.nbytes + plan.bookkeeping - unused for plan in plans]


def test_refused_and_defaults() -> None:
    with pytest.raises(ValueError, match="queries must be a whole number of tokens, at least 1, got 0"):
        LogitSpread(queries=0)
    plan = ImagePlan(tokens=64, row=8, budget=24)
    assert [LogitSpread().attention_window(plan), LogitSpread(queries=5).mean_window(plan)] == [8, 5]
    assert LogitSpread(queries=50).attention_window(TextPlan(80)) == LogitSpread().attention_window(TextPlan(80)) == 16
    assert LogitSpread().attention_window(TextPlan(8192)) == 32
    assert LogitSpread().queries_needed(plan, decoding=True) == 0
    method = get_method("logit-spread")
    assert isinstance(method.image, Pieces)
    assert get_method("snapkv").with_options({"scorer": "LogitSpread"}).image == method.image
