# SPDX-License-Identifier: Apache-2.0
"""Budgets by head type: exact totals, and labels that follow the attention."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from headkv_mm.allocators import HeadType, Uniform
from headkv_mm.allocators.head_type import redistributed
from headkv_mm.budgets import ImagePlan
from headkv_mm.pieces import Observed
from headkv_mm.ragged import RaggedKV

NO_SCORES = torch.empty(0)


@given(data=st.data(), rows=st.integers(1, 3), heads=st.integers(1, 12), limit=st.integers(2, 300))
def test_redistribution_is_exact_and_within_bounds(data: st.DataObject, rows: int, heads: int, limit: int) -> None:
    budget = data.draw(st.integers(1, limit))
    window = data.draw(st.integers(1, budget))
    flags = data.draw(st.lists(st.booleans(), min_size=rows * heads, max_size=rows * heads))
    local = torch.tensor(flags).view(rows, heads)
    column = torch.ones(rows, 1, dtype=torch.int32)
    targets = redistributed(local, window=column * window, budget=column * budget, limit=column * limit)
    assert targets.dtype == torch.int32
    assert targets.sum(-1).tolist() == [budget * heads] * rows
    assert targets.min() >= window
    assert targets.max() <= max(limit, budget)
    for row in range(rows):
        some, every = local[row].any(), local[row].all()
        if some and not every:
            # Global heads never get less than the budget, and equal heads differ by one entry at most.
            assert targets[row][~local[row]].min() >= budget
            assert targets[row][~local[row]].max() - targets[row][~local[row]].min() <= 1
            assert targets[row][local[row]].max() - targets[row][local[row]].min() <= 1


def observed(window_share: float) -> Observed:
    """Two heads over 3 condition and 40 image tokens: the first looks at its newest 8 tokens, the second everywhere."""
    plan, condition, image = ImagePlan(tokens=64, row=8, budget=24), 3, 40
    count, head_dim = condition + image, 16
    store = RaggedKV.empty(torch.full((1, 2), count, dtype=torch.int32), [2 * count], head_dim, dtype=torch.float32)
    keys = torch.zeros(1, 2, count, head_dim)
    # Logits of the near tokens exceed the others by enough for the wanted share of the mass.
    far, near = image - 8, 8
    keys[0, 0, -8:, 0] = torch.log(torch.tensor(window_share / (1 - window_share) * far / near))
    store.append_chunk(
        keys, torch.zeros_like(keys), torch.ones(1, count, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
    )
    queries = torch.zeros(1, 1, 2, head_dim)
    queries[..., 0] = 1.0
    return Observed(
        store=store,
        plan=plan,
        condition=torch.tensor([condition], dtype=torch.int32),
        seen=torch.tensor([count], dtype=torch.int32),
        scale=1.0,
        row_budgets=[24],
        row_seen=[count],
        queries=queries,
        query_positions=torch.tensor([[count - 1]], dtype=torch.int32),
    )


def test_a_head_is_local_when_the_window_holds_tau_of_its_mass() -> None:
    assert HeadType(tau=0.9).allocate(observed(0.95), NO_SCORES).local.tolist() == [[True, False]]
    assert HeadType(tau=0.98).allocate(observed(0.95), NO_SCORES).local.tolist() == [[False, False]]


def test_what_the_local_head_leaves_goes_to_the_global_one() -> None:
    allocation = HeadType().allocate(observed(0.95), NO_SCORES)
    assert allocation.targets.tolist() == [[16, 32]]
    assert allocation.windows.tolist() == [[16, 16]]
    assert HeadType(redistribute=False).allocate(observed(0.95), NO_SCORES).targets.tolist() == [[16, 24]]


def test_uniform_gives_everyone_the_budget() -> None:
    allocation = Uniform(window_rows=1).allocate(observed(0.95), NO_SCORES)
    assert allocation.targets.tolist() == [[24, 24]]
    assert allocation.windows.tolist() == [[10, 10]]  # never below one row and two tokens
    assert allocation.local is None
