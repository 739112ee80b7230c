# SPDX-License-Identifier: Apache-2.0
"""What allocators have in common that let heads compete by what the last queries attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..budgets import ImagePlan
from ..pieces import Allocation, Observed
from ..plan import Plan
from .pooled import allocation_of, counted_of
from .shares import apportioned, apportioned_at_most
from .uniform import check_windows


@dataclass(frozen=True)
class Pool:
    """What the heads of a row divide, beside the window that each of them has; everything [B, 1] int64.

    Attributes:
        free: entries per head on the average.
        least, most: what no head falls below, and what none exceeds.
        counted: how many of the entries that are there now stand for `free`, see `counted_of`.
    """

    free: Tensor
    least: Tensor
    most: Tensor
    counted: Tensor

    def divided(self, weights: Tensor) -> Tensor:
        """Shares of K heads in proportion to weights [B, K] above the least, rows sum to exactly K times `free`."""
        total = weights.shape[1] * (self.free - self.least)
        limit = (self.most - self.least).expand(weights.shape)
        shares: Tensor = self.least + apportioned(weights, total, limit)
        return shares

    def at_most(self, weights: Tensor, others: int, heaviest: Tensor) -> Tensor:
        """What `divided` gives K heads at most, if others with weights up to `heaviest` [B, 1] join them; [B, K]."""
        total = (weights.shape[1] + others) * (self.free - self.least)
        shares = apportioned_at_most(weights, total, self.most - self.least, others=others, heaviest=heaviest)
        return self.least + shares


@dataclass(frozen=True)
class Competition:
    """Heads of a layer, or of the whole model, divide one pool: all of them together keep exactly the uniform budget.

    Each has its window, `floor` of what it would have with equal budgets, and of the rest what a subclass gives it. A
    subclass looks at every layer when that layer decides (`look`) and divides when all have come (`weigh`).

    Attributes:
        floor: share of an equal budget that every head keeps whatever it attends to; 1 is the uniform budget.
        most: the most that a head can get, in equal budgets.
        window: newest tokens of a text that are protected, at most half of the budget.
        window_rows: newest rows of an image that are protected.
        scope: "layer" or "model", who competes.
        grouping_queries: newest queries over which attention is averaged; None: one row of an image, the window of a
            text.
    """

    nothing: ClassVar[float] = 0.0
    """What is noted of a head that has no claim to anything."""

    floor: float = 0.2
    most: float = 4.0
    window: int = 32
    window_rows: float = 1.0
    scope: Literal["layer", "model"] = "layer"
    grouping_queries: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must be a share in [0, 1], got {self.floor}")
        if self.most < 1.0:
            raise ValueError(f"most must be at least one budget, got {self.most}")
        check_windows(self.window, self.window_rows)
        if self.scope not in ("layer", "model"):
            raise ValueError(f"scope must be 'layer' or 'model', got {self.scope!r}")
        if self.grouping_queries is not None and self.grouping_queries < 1:
            raise ValueError(f"grouping_queries must be at least 1 or None, got {self.grouping_queries}")

    @property
    def over_layers(self) -> bool:
        """True for scope "model"."""
        return self.scope == "model"

    def queries_needed(self, plan: Plan) -> int:
        """One row of queries, or a text's window, unless said otherwise."""
        if self.grouping_queries is not None:
            return self.grouping_queries
        return plan.step if isinstance(plan, ImagePlan) else self.window

    def look(self, observed: Observed, pool: Pool) -> Tensor:
        """What counts of a layer, [B, all heads, ...]."""
        raise NotImplementedError

    def weigh(self, noted: Tensor, pool: Pool) -> Tensor:
        """Weights [B, K] by which K heads divide what is above the least, from what `look` gave of them.

        With other heads beside them the weights of these are smaller by a common factor, or some of them are smaller
        because the best entries of a row are found in the others.
        """
        raise NotImplementedError

    def heaviest(self, noted: Tensor, observed: Observed, pool: Pool) -> Tensor:
        """What the weight of a head that is still to come cannot exceed, on the scale that `weigh` chose; [B, 1]."""
        return torch.full_like(pool.free, float("inf"), dtype=torch.float64)

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Divide the budget of one layer."""
        return self.divide([(replace(observed, noted=self.note(observed, scores)), scores)])[0]

    def note(self, observed: Observed, scores: Tensor) -> Tensor:
        """What counts of a layer, [B, all heads, ...]."""
        return self.look(observed, self._pool(observed))

    def preselect(self, observed: Observed, scores: Tensor) -> Allocation:
        """The most that a head can get."""
        window, pool = observed.per_row(self.windows(observed)), self._pool(observed)
        return allocation_of((window + pool.most).expand(-1, observed.heads), window)

    def at_most(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """What `divide` gives these layers at most: the total is fixed, and heads to come only take from it."""
        first = layers[0][0]
        noted, pool = self._noted(layers), self._pool(first)
        heads, count = noted.shape[1], first.heads * first.plan.place.count
        rest = noted.new_full((noted.shape[0], max(count - heads, 0), *noted.shape[2:]), self.nothing)
        weights = self.weigh(torch.cat([noted, rest], dim=1), pool)[:, :heads]
        shares = pool.at_most(weights, rest.shape[1], self.heaviest(noted, first, pool))
        # Only where as much is counted as is divided do weights that count entries say how many a head gets.
        shares = torch.where(pool.counted == pool.free, shares, pool.most)
        window = first.per_row(self.windows(first))
        return [
            ((window + part).to(observed.seen.device), window.to(observed.seen.device))
            for (observed, _), part in zip(layers, shares.split(first.heads, dim=1), strict=True)
        ]

    def divide(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[Allocation]:
        """Divide one budget among all heads of these layers.

        Raises:
            RuntimeError: if nothing was noted of a layer.
        """
        first = layers[0][0]
        pool = self._pool(first)
        shares = pool.divided(self.weigh(self._noted(layers), pool))  # [B, L * G]
        targets = first.per_row(self.windows(first)) + shares
        totals = targets.unflatten(1, (-1, first.heads)).sum(-1)  # [B, L]
        before = (totals.cumsum(-1) - totals).T.tolist()
        return [
            allocation_of(part.to(observed.seen.device), observed.per_row(self.windows(observed)), row_before)
            for (observed, _), part, row_before in zip(layers, targets.split(first.heads, dim=1), before, strict=True)
        ]

    def _noted(self, layers: Sequence[tuple[Observed, Tensor]]) -> Tensor:
        """What was noted of layers, side by side on the first one's device, [B, heads of all, ...]."""
        parts = [observed.noted.to(layers[0][0].seen.device) for observed, _ in layers if observed.noted is not None]
        if len(parts) < len(layers):
            raise RuntimeError("nothing was noted of a layer that is to be divided")
        if parts[0].dim() > 2:  # by rank, of as many entries as the layer still holds
            longest = max(part.shape[-1] for part in parts)
            parts = [pad(part, (0, longest - part.shape[-1]), value=self.nothing) for part in parts]
        return torch.cat(parts, dim=1)

    def windows(self, observed: Observed) -> list[int]:
        """Protected newest entries, by row."""
        return observed.plan.windows_of(observed.row_budgets, tokens=self.window, rows=self.window_rows)

    def _pool(self, observed: Observed) -> Pool:
        windows, plan = self.windows(observed), observed.plan
        free = [budget - window for budget, window in zip(observed.row_budgets, windows, strict=True)]
        most = [
            min(int(self.most * own), max(plan.limit(seen) - window, own))
            for own, window, seen in zip(free, windows, observed.row_seen, strict=True)
        ]
        return Pool(
            free=observed.per_row(free).long(),
            least=observed.per_row([int(self.floor * own) for own in free]).long(),
            most=observed.per_row(most).long(),
            counted=counted_of(observed, windows),
        )
