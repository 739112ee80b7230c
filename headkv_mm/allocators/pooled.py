# SPDX-License-Identifier: Apache-2.0
"""Heads of a layer compete for one pool of entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from .shares import scaled
from .uniform import check_windows

_UNITS = 1000
"""The uniform share is rounded to a thousandth, so that everything is whole numbers and ties are true ties."""


@dataclass(frozen=True)
class Pooled:
    """The best scores of a layer, over all heads together, decide how many entries each head keeps (arXiv 2407.11550).

    Outside the sinks and the window, of b entries per head on the average, the G b best of the layer's scores are
    counted by head: f_g. A head keeps its window and `(1 - alpha) f_g + alpha b` entries, made whole by largest
    remainder, so that a layer holds exactly its budget.

    While an image is written the budget is decided before all of its tokens are there; then the same share of what is
    there is counted as will be kept of the whole image.

    Attributes:
        alpha: share that is the same for every head; 1 is the uniform budget, 0 the pure competition.
        window: newest tokens of a text that are protected, at most half of the budget.
        window_rows: newest rows of an image that are protected.
    """

    alpha: float = 0.2
    window: int = 32
    window_rows: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        check_windows(self.window, self.window_rows)

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Count the best of every row and divide its budget."""
        plan, heads, budgets = observed.plan, observed.store.kv_heads, observed.row_budgets
        windows = plan.windows_of(budgets, tokens=self.window, rows=self.window_rows)
        ratios = [
            (budget - window, max(plan.limit(seen) - window, budget - window, 1))
            for budget, window, seen in zip(budgets, windows, observed.row_seen, strict=True)
        ]
        window = observed.per_row(windows)  # [B, 1]
        free, room = (observed.per_row(numbers).long() for numbers in zip(*ratios, strict=True))
        candidates, values = _candidates(observed, scores, window)  # [B, G, M]
        there = candidates.sum((1, 2))[:, None] // heads  # [B, 1], candidates per head
        # In a text `there` is `room` wherever something has to leave, so this is exactly b.
        counted = ((there * free + room // 2) // room).clamp(min=1)
        found = best_of_row(values, candidates, counted * heads)  # [B, G]
        uniform = round(self.alpha * _UNITS)
        weights = ((_UNITS - uniform) * found + uniform * counted).clamp(min=0)
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1)
        targets = window + scaled(weights, free * heads)
        return Allocation(
            targets=targets.to(torch.int32),
            windows=window.expand_as(targets).contiguous(),
            row_totals=[budget * heads for budget in budgets],
            largest=int(targets.max()),
        )


def _candidates(observed: Observed, scores: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries may be chosen, [B, G, M] bool newest first, and their scores."""
    store = observed.store
    slots, filled = store.slots_in_order()
    slots, filled = slots.flip(-1), filled.flip(-1)
    position = store.positions[slots]
    first, last = observed.condition[:, None, None], (observed.seen[:, None] - window)[..., None]
    return filled & (position >= first) & (position < last), scores[slots].float()


def best_of_row(values: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """How many of the `count` best candidates of a row each head has; of equal scores the newer one is better.

    Args:
        values: [B, G, M] float, in the same order in every head, newest first.
        candidates: [B, G, M] bool.
        count: [B, 1] int.

    Returns:
        [B, G] int64; fewer in all than `count` where there are fewer candidates.
    """
    heads = values.shape[1]
    # Position by position, so that of equal scores the newer, and then the one of the first head, comes first.
    flat = values.masked_fill(~candidates, float("-inf")).transpose(1, 2).flatten(1)  # [B, M * G]
    order = flat.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(flat.shape[1], device=flat.device) < count  # [B, M * G]
    chosen &= candidates.transpose(1, 2).flatten(1).gather(1, order)
    found = torch.zeros(values.shape[0], heads, dtype=torch.int64, device=values.device)
    return found.scatter_add_(1, order % heads, chosen.long())
