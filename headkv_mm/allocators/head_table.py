# SPDX-License-Identifier: Apache-2.0
"""Budgets by a table of head scores that was measured once for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from .shares import apportioned
from .uniform import check_windows

Scores = tuple[tuple[float, ...], ...]
"""By compressed layer and KV head."""


@dataclass(frozen=True)
class HeadTableShares:
    """Heads that a table scores higher keep more, over all layers of the model (arXiv 2410.19258, HeadKV-R2).

    Outside the sinks and the window, of b entries per head on the average, every head gives p = floor(b / beta) into a
    pool and keeps b - p; the pool is divided in proportion to the scores. No head gets more than there is: what is cut
    off goes to the others. All heads of the model together keep exactly what they would with equal budgets.

    Attributes:
        table: file of a head table; None for the one that ships for the model.
        beta: a smaller one makes a larger pool; at least 1.
        window: newest tokens of a text that are protected, at most half of the budget.
        scores: scores of one's own in place of a table's, by compressed layer and KV head.
    """

    table: str | None = None
    beta: float = 1.2
    window: int = 8
    scores: Scores | None = None

    def __post_init__(self) -> None:
        if self.beta < 1.0:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        check_windows(self.window, 0.0)
        if self.table is not None and not isinstance(self.table, str):
            raise ValueError(f"table must be the name of a file, got {self.table!r}")
        if self.scores is not None:
            object.__setattr__(self, "scores", _checked(self.scores))

    def for_model(self, model_or_config: Any) -> HeadTableShares:
        """The same with the scores of the table, if it has none yet.

        Raises:
            ValueError: if there is no table for this model, or the table is of another one.
            FileNotFoundError: if there is no such file.
        """
        if self.scores is not None:
            return self
        from ..head_tables import head_table_for

        return replace(self, scores=_checked(head_table_for(model_or_config, self.table).kv_scores().tolist()))

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """The layer's part of the table.

        Raises:
            ValueError: without scores, or for those of a model of another shape.
        """
        plan, heads, budgets = observed.plan, observed.heads, observed.row_budgets
        place = plan.place
        if self.scores is None:
            raise ValueError("this allocator has no scores; a HeadKVCache takes them from the model's head table")
        if (len(self.scores), len(self.scores[0])) != (place.count, heads):
            raise ValueError(
                f"the scores are of {len(self.scores)} layers with {len(self.scores[0])} KV heads, and the model has "
                f"{place.count} layers with {heads}"
            )
        windows = plan.windows_of(budgets, tokens=self.window, rows=0.0)
        rows, before = [], []
        for budget, window, seen in zip(budgets, windows, observed.row_seen, strict=True):
            layers = table_shares(self.scores, budget - window, plan.limit(seen) - window, self.beta)
            rows.append([window + share for share in layers[place.index]])
            before.append(place.index * heads * window + sum(sum(layer) for layer in layers[: place.index]))
        return Allocation(
            targets=torch.tensor(rows, dtype=torch.int32, device=observed.seen.device),
            windows=observed.per_row(windows).expand(-1, heads).contiguous(),
            row_totals=[sum(row) for row in rows],
            largest=max(max(row) for row in rows),
            row_before=before,
        )


@lru_cache(maxsize=512)
def table_shares(scores: Scores, budget: int, limit: int, beta: float) -> tuple[tuple[int, ...], ...]:
    """Entries by layer and head, in proportion to scores but for what every head keeps.

    Args:
        scores: by layer and head, not negative.
        budget: mean entries per head.
        limit: the most that a head can hold; the budget where that is more.
        beta: see `HeadTableShares`.

    Returns:
        Whole numbers of the same shape that sum to exactly `budget` times the number of heads.
    """
    weights = torch.tensor(scores, dtype=torch.float64).flatten()  # [L * G]
    pooled = int(budget / beta)
    own = budget - pooled
    total = torch.tensor([pooled * weights.numel()])
    shares = own + apportioned(weights, total, torch.full(weights.shape, max(limit, budget) - own))
    return tuple(tuple(layer) for layer in shares.view(len(scores), -1).tolist())


def _checked(scores: Sequence[Sequence[float]]) -> Scores:
    """Scores as nested tuples.

    Raises:
        ValueError: if they are not numbers by layer and head.
    """
    try:
        table = torch.tensor([[float(score) for score in layer] for layer in scores], dtype=torch.float64)
    except (TypeError, ValueError):
        table = torch.empty(0)
    if table.dim() != 2 or not table.numel() or not bool((table.isfinite() & (table >= 0)).all()):
        raise ValueError("scores must be finite numbers, not negative, for every KV head of every layer")
    return tuple(tuple(layer) for layer in table.tolist())
