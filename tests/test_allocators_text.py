# SPDX-License-Identifier: Apache-2.0
"""Budgets that differ between heads and layers of a text: formulas, exact totals, and growth."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.allocators import HeadTableShares, Pooled, Pyramid
from headkv_mm.allocators.head_table import table_shares
from headkv_mm.allocators.pooled import best_of_row
from headkv_mm.allocators.pyramid import pyramid
from headkv_mm.allocators.shares import apportioned, scaled
from headkv_mm.decided import Decided
from headkv_mm.pieces import Allocation, Allocator, Observed
from headkv_mm.plan import LayerPlace
from headkv_mm.ragged import RaggedKV
from headkv_mm.text_plan import TextPlan

NO_SCORES = torch.empty(0)


def observed(seen: list[int], budget: int, heads: int, *, layer: int = 0, layers: int = 1) -> Observed:
    """Rows that hold everything they have seen; keys and values do not matter."""
    longest = max(seen)
    empty = torch.zeros(len(seen), heads, longest, 1)
    count = torch.tensor(seen, dtype=torch.int32)
    plan = TextPlan(budget, place=LayerPlace(layer, layers))
    sinks = plan.held_sinks(budget)
    return Observed(
        store=RaggedKV.over(empty, empty, longest - count),
        plan=plan,
        condition=torch.full_like(count, sinks),
        seen=count,
        scale=1.0,
        row_budgets=[budget - sinks] * len(seen),
        row_seen=seen,
    )


def check_numbers_on_the_host(allocation: Allocation) -> None:
    assert allocation.targets.dtype == allocation.windows.dtype == torch.int32
    assert allocation.targets.sum(-1).tolist() == allocation.row_totals
    assert int(allocation.targets.max()) <= allocation.largest
    assert (allocation.windows <= allocation.targets).all()
    assert int(allocation.targets.min()) >= 1


@given(st.integers(1, 400), st.integers(1, 2000), st.integers(1, 40), st.sampled_from([1.0, 1.5, 20.0, 1000.0]))
def test_a_pyramid_is_a_line_with_an_exact_sum(budget: int, limit: int, layers: int, beta: float) -> None:
    found = pyramid(budget, limit, layers, beta)
    assert sum(found) == budget * layers
    assert max(found) <= max(limit, budget)
    assert min(found) >= 0
    first = min(2 * budget - budget / beta, max(limit, budget))
    for layer, entries in enumerate(found):
        exact = first + (2 * budget - 2 * first) * layer / (layers - 1) if layers > 1 else budget
        assert abs(entries - exact) < 1 + 1e-6
        assert layer == 0 or found[layer - 1] >= entries - 1


def test_a_pyramid_by_hand() -> None:
    assert pyramid(100, 1000, 5, 20.0) == [195, 148, 100, 52, 5]  # 195, 147.5, 100, 52.5, 5
    assert pyramid(100, 150, 3, 20.0) == [150, 100, 50]
    assert pyramid(7, 100, 3, 1.0) == [7, 7, 7]


@given(
    st.data(),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 300),
    st.integers(0, 600),
    st.sampled_from([1, 1.2, 5]),
)
def test_a_table_is_shared_out_exactly(
    data: Any, layers: int, heads: int, budget: int, limit: int, beta: float
) -> None:
    numbers = st.floats(0, 1, allow_subnormal=False)
    scores = data.draw(st.lists(st.tuples(*[numbers] * heads), min_size=layers, max_size=layers))
    found = [entries for layer in table_shares(tuple(scores), budget, limit, beta) for entries in layer]
    assert sum(found) == budget * layers * heads
    assert max(found) <= max(limit, budget)
    flat = [score for layer in scores for score in layer]
    pooled = int(budget / beta)
    assert min(found) >= budget - pooled
    total = sum(flat)
    exact = [budget - pooled + (score / total if total else 1 / len(flat)) * pooled * len(flat) for score in flat]
    if max(exact) <= max(limit, budget):
        assert all(abs(entries - wanted) < 1 + 1e-6 for entries, wanted in zip(found, exact, strict=True))
    else:  # heads above the limit are cut off, and nobody else loses by it
        assert all(
            entries == max(limit, budget) if wanted >= max(limit, budget) + 1 else entries > wanted - 1 - 1e-6
            for entries, wanted in zip(found, exact, strict=True)
        )


def test_a_table_by_hand() -> None:
    # Of 12 entries 10 go into the pool: 40 are divided 4:3:2:1.
    assert table_shares(((4.0, 3.0), (2.0, 1.0)), 12, 100, 1.2) == ((18, 14), (10, 6))
    # The first head gets no more than 15; its 3 go to the others, 3:2:1.
    assert table_shares(((4.0, 3.0), (2.0, 1.0)), 12, 15, 1.2) == ((15, 15), (11, 7))


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(0, 100))
def test_the_best_of_a_row_are_counted(data: Any, rows: int, heads: int, longest: int, count: int) -> None:
    values = torch.tensor(
        data.draw(st.lists(st.integers(0, 6), min_size=rows * heads * longest, max_size=rows * heads * longest))
    )
    values = values.view(rows, heads, longest).float()
    flags = data.draw(st.lists(st.booleans(), min_size=values.numel(), max_size=values.numel()))
    candidates = torch.tensor(flags).view_as(values)
    found = best_of_row(values, candidates, torch.full((rows, 1), count))
    for row in range(rows):
        ranked = sorted(
            (-float(values[row, head, index]), index, head)
            for head in range(heads)
            for index in range(longest)
            if candidates[row, head, index]
        )
        expected = [sum(head == which for _, _, which in ranked[:count]) for head in range(heads)]
        assert found[row].tolist() == expected


@given(
    st.integers(8, 60), st.lists(st.integers(61, 150), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 999)
)
@settings(max_examples=50)
def test_heads_compete_for_a_layer(budget: int, seen: list[int], heads: int, seed: int) -> None:
    state = observed(seen, budget, heads)
    store = state.store
    generator = torch.Generator().manual_seed(seed)
    # Heads of different levels, so that some win.
    scores = torch.rand(store.positions.shape, generator=generator)
    scores *= (torch.rand(heads, generator=generator) * 2)[None, :, None].expand(len(seen), heads, max(seen)).flatten()
    for alpha in (0.0, 0.2, 1.0):
        allocation = Pooled(alpha=alpha, window=8).allocate(state, scores)
        check_numbers_on_the_host(allocation)
        sinks, window = state.plan.held_sinks(budget), int(allocation.windows[0, 0])
        free = budget - sinks - window
        assert allocation.row_totals == [(budget - sinks) * heads] * len(seen)
        for row, tokens in enumerate(seen):
            entries = [
                (float(scores[int(store.start[row, head]) + at]), at, -head)
                for head in range(heads)
                for at in range(sinks, tokens - window)
            ]
            winners = [-head for _, _, head in sorted(entries, reverse=True)[: free * heads]]
            for head in range(heads):
                exact = (1 - alpha) * winners.count(head) + alpha * free
                assert abs(int(allocation.targets[row, head]) - window - exact) < 1


LAYERS, HEADS = 4, 3
SCORES = tuple(tuple(float((7 * layer + 3 * head) % 11) for head in range(HEADS)) for layer in range(LAYERS))
OVER_LAYERS = [
    Pyramid(),
    Pyramid(beta=3, window=4),
    HeadTableShares(scores=SCORES),
    Pooled(),
    HeadTableShares(beta=5, scores=SCORES),
]


@pytest.mark.parametrize("allocator", OVER_LAYERS, ids=lambda allocator: type(allocator).__name__)
@given(
    budget=st.integers(8, 90), seen=st.lists(st.integers(91, 300), min_size=1, max_size=3), grown=st.integers(0, 200)
)
@settings(max_examples=25)
def test_totals_over_the_layers_are_exact_also_as_they_grow(
    allocator: Allocator, budget: int, seen: list[int], grown: int
) -> None:
    totals, later = torch.zeros(len(seen), dtype=torch.long), torch.zeros(len(seen), dtype=torch.long)
    wanted = budget - budget // 4 if budget < 16 else budget - 4
    for layer in range(LAYERS):
        state = observed(seen, budget, HEADS, layer=layer, layers=LAYERS)
        scores = torch.rand(state.store.positions.shape, generator=torch.Generator().manual_seed(layer))
        allocation = allocator.allocate(state, scores)
        check_numbers_on_the_host(allocation)
        if allocation.row_before is not None:
            assert allocation.row_before == totals.tolist()
        totals += torch.tensor(allocation.row_totals)
        assert int((allocation.targets - torch.tensor(seen)[:, None]).max()) <= 0  # no more than there is
        for row in range(len(seen)):
            decided = Decided.of(allocation, row, wanted)
            assert decided.grown(wanted) is decided.allocation
            more = decided.grown(wanted + grown)
            check_numbers_on_the_host(more)
            later[row] += more.row_totals[0]
            exact = allocation.targets[row] * (wanted + grown) / wanted
            assert (more.targets[0] - exact).abs().max() < 2.01
            if more.row_before is not None:
                assert more.row_before == [int(later[row]) - more.row_totals[0]]
    assert totals.tolist() == [LAYERS * HEADS * wanted] * len(seen)
    assert later.tolist() == [LAYERS * HEADS * (wanted + grown)] * len(seen)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any), st.integers(0, 10**6))
def test_scaling_is_exact(weights: list[int], total: int) -> None:
    found = scaled(torch.tensor([weights]), torch.tensor([[total]]))[0].tolist()
    assert found == scaled(torch.tensor([weights]), total)[0].tolist()
    assert sum(found) == total
    for share, weight in zip(found, weights, strict=True):
        assert share in (math.floor(exact := Fraction(weight * total, sum(weights))), math.ceil(exact))


@given(st.data(), st.integers(1, 8))
def test_apportioning_is_exact_and_within_limits(data: Any, count: int) -> None:
    limits = data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    total = data.draw(st.integers(0, sum(limits)))
    found = apportioned(torch.tensor([weights]), torch.tensor([[total]]), torch.tensor([limits]))[0].tolist()
    assert sum(found) == total
    assert all(0 <= share <= limit for share, limit in zip(found, limits, strict=True))
    for one in range(count):
        for other in range(count):
            # Nobody gets less than another of smaller weight unless it is full.
            if weights[one] > weights[other] and found[one] < limits[one]:
                assert found[one] >= found[other] - 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pooled(alpha=1.5), r"alpha must lie in \[0, 1\]"),
        (lambda: Pooled(window=0), "window must be a whole number"),
        (lambda: Pyramid(beta=0.5), "beta must be at least 1"),
        (lambda: HeadTableShares(beta=0.0), "beta must be at least 1"),
        (lambda: HeadTableShares(table=3), "table must be the name of a file"),  # type: ignore[arg-type]
        (lambda: HeadTableShares(scores=((1.0,), (2.0, 3.0))), "scores must be finite numbers"),
        (lambda: HeadTableShares(scores=((float("nan"),),)), "scores must be finite numbers"),
        (lambda: HeadTableShares(scores="abc"), "scores must be finite numbers"),  # type: ignore[arg-type]
        (lambda: HeadTableShares().allocate(observed([40], 20, 2), NO_SCORES), "has no scores"),
        (
            lambda: HeadTableShares(scores=((1.0,),)).allocate(observed([40], 20, 2), NO_SCORES),
            "1 layers with 1 KV heads, and the model has 1 layers with 2",
        ),
    ],
)
def test_refused_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_may_come_as_lists() -> None:
    """As they do out of a saved cache."""
    assert HeadTableShares(scores=[[1, 2], [3, 4]]) == HeadTableShares(scores=((1.0, 2.0), (3.0, 4.0)))  # type: ignore[arg-type]


def test_growing_reads_nothing_from_the_device() -> None:
    """Budgets that are shares of a text grow while it is decoded; tensors on the meta device have no content."""
    one = torch.ones(1, 4, dtype=torch.int32, device="meta")
    decided = Decided(Allocation(one, one, [37], 20, row_before=[12]), 10)
    grown = decided.grown(21)
    assert (grown.row_before, grown.row_totals) == ([25], [102 - 25])
    assert grown.targets.device.type == "meta"
