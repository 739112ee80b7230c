# SPDX-License-Identifier: Apache-2.0
"""What a head can get at most while others are still to come: never less than what it gets, whatever the others are."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm.allocators.shares import apportioned, apportioned_at_most


def column(number: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([[number]], dtype=dtype)


# Powers make weights of very different sizes, where what every head gets on top of its weight is not little.
WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1), st.floats(-40, 0).map(lambda exponent: 10**exponent)),
    min_size=2,
    max_size=9,
)


@settings(max_examples=120)
@given(WEIGHTS, st.data())
@example([1.0, 1e-8, 1e-10, 1.0], None)
def test_no_share_exceeds_its_bound(weights: list[float], data: st.DataObject | None) -> None:
    heads, known = len(weights), 3
    free, limit = 30, 50
    if data is not None:
        free = data.draw(st.integers(0, 200))
        limit = data.draw(st.integers(free, 16 * free + 1))
        known = data.draw(st.integers(1, heads))
    weights_now = torch.tensor([weights], dtype=torch.float64)
    total = column(heads * free)
    final = apportioned(weights_now, total, torch.full((1, heads), limit))
    before = None
    for count in range(known, heads + 1):
        seen = weights_now[:, :count]
        heaviest = weights_now[:, count:].amax(-1, keepdim=True) if count < heads else 0.0
        for largest in (heaviest, float("inf")):
            bound = apportioned_at_most(seen, total, column(limit), others=heads - count, heaviest=largest)
            assert (final[:, :count] <= bound).all(), (final, bound, count)
            assert int(bound.max()) <= limit
        # Only the proportions count.
        scaled = apportioned_at_most(4 * seen, total, column(limit), others=heads - count)
        assert (scaled - bound).abs().max() <= 1
        if before is not None:
            assert (bound[:, : before.shape[1]] <= before + 1).all()
        before = bound
    assert before is not None
    assert (before - final).max() <= 1  # nobody is to come: what is known is exact, but for rounding


def test_a_head_far_ahead_is_bounded_by_what_is_there() -> None:
    total, limit = column(120), column(100)
    seen = torch.tensor([[8.0, 1.0, 1.0]])
    alone = apportioned_at_most(seen, total, limit, others=9, heaviest=1.0)
    assert alone.tolist() == [[97, 13, 13]]
    more = torch.tensor([[8.0, 1.0, 1.0, 8.0, 6.0]])
    assert apportioned_at_most(more, total, limit, others=7, heaviest=1.0).tolist() == [[41, 6, 6, 41, 31]]


def test_rows_are_bounded_alone() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0], [5.0, 1.0, 0.0], [1e-20, 1e-30, 1e-40]])
    total, limit = torch.tensor([[30], [60], [9]]), torch.tensor([[12], [20], [9]])
    together = apportioned_at_most(weights, total, limit, others=3)
    for row in range(3):
        own = slice(row, row + 1)
        assert apportioned_at_most(weights[own], total[own], limit[own], others=3).tolist() == together[own].tolist()
    assert together[0].tolist() == [6, 6, 6]  # if nobody has any weight all get the same


def test_what_every_head_gets_on_top_grows_with_the_heads_to_come() -> None:
    weights = torch.tensor([[1.0, 1e-3, 1e-6, 1e15, 0.0, 0.0]], dtype=torch.float64)
    total, limit = column(150), column(100)
    assert apportioned(weights, total, limit.expand(1, 6)).tolist() == [[10, 10, 10, 100, 10, 10]]
    seen = weights[:, :3]
    assert apportioned_at_most(seen, total, limit, others=3, heaviest=1.0).tolist() == [[100, 50, 1]]  # not enough
    assert apportioned_at_most(seen, total, limit, others=3, heaviest=1e15).tolist() == [[100, 50, 25]]
