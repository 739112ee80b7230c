# SPDX-License-Identifier: Apache-2.0
"""Local heads keep a window, global heads keep more: budgets by head type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets import ImagePlan
from ..heads import is_local
from ..pieces import Allocation, Observed
from ..plan import Plan
from .uniform import check_windows


@dataclass(frozen=True)
class HeadType:
    """Find local heads from the newest queries' attention, once per row, and give them a window only.

    Source: arXiv 2605.20600, for images. In a text the same is done at the end of the prompt (or when the budget is
    first exceeded), with the window's queries.

    Attributes:
        tau: share of the attention mass that the local window must hold for a head to be local.
        window: tokens of a text's protected window, at most half of the budget, and how many queries are averaged.
        local_window: tokens that a local head of a text keeps, at most half of the budget.
        window_rows: rows of an image's local window, which is also the protected window of global heads.
        grouping_queries: newest queries over which the mass is averaged; None: one row of an image, the window of a
            text; 1: the paper's single query.
        include_condition: count attention to an image's condition, or to a text's sinks, as mass too.
        share_labels: one label per head for the whole batch, by majority, instead of one per row and head.
        redistribute: give what local heads leave to the global heads of the same layer and row, so that the layer
            holds exactly the uniform budget. False is the paper's form, which saves more.
    """

    tau: float = 0.9
    window: int = 32
    local_window: int = 64
    window_rows: float = 2.0
    grouping_queries: int | None = None
    include_condition: bool = False
    share_labels: bool = False
    redistribute: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}")
        check_windows(self.window, self.window_rows)
        check_windows(self.local_window, 0.0)
        if self.grouping_queries is not None and self.grouping_queries < 1:
            raise ValueError(f"grouping_queries must be at least 1 or None, got {self.grouping_queries}")

    def queries_needed(self, plan: Plan) -> int:
        """One row of queries, or a text's window, unless said otherwise."""
        if self.grouping_queries is not None:
            return self.grouping_queries
        return plan.step if isinstance(plan, ImagePlan) else self.window

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Label the heads of every row and divide the layer's budget."""
        plan, heads = observed.plan, observed.heads
        budgets = observed.row_budgets
        windows = plan.windows_of(budgets, tokens=self.window, rows=self.window_rows)
        narrow = plan.windows_of(budgets, tokens=self.local_window, rows=self.window_rows)  # of local heads
        window, small = observed.per_row(windows), observed.per_row(narrow)  # [B, 1]
        local = is_local(
            observed,
            queries=self.queries_needed(plan),
            window=small,
            tau=self.tau,
            include_condition=self.include_condition,
        )
        local = observed.shard.gather(local)  # [B, all heads]
        if self.share_labels:
            local = (local.float().mean(0, keepdim=True) > 0.5).expand_as(local)
        budget = observed.per_row(budgets)
        if self.redistribute:
            limits = [plan.limit(seen) for seen in observed.row_seen]
            targets = redistributed(local, window=small, budget=budget, limit=observed.per_row(limits))
            row_totals = [entries * heads for entries in budgets]
            largest = max(
                min(max(limit, entries), entries + (heads - 1) * (entries - few))
                for limit, entries, few in zip(limits, budgets, narrow, strict=True)
            )
        else:
            targets = torch.where(local, small, budget).to(torch.int32)
            row_totals, largest = targets.sum(-1).tolist(), max(budgets)
        return Allocation(
            targets=targets,
            windows=torch.where(local, targets, window).to(torch.int32),
            row_totals=row_totals,
            largest=largest,
            local=local,
        )


def redistributed(local: Tensor, *, window: Tensor, budget: Tensor, limit: Tensor) -> Tensor:
    """Divide `budget * G` entries of every row: local heads get the window, global heads the rest in equal shares.

    No head gets more than `limit`; what global heads cannot take goes back to the local ones. Where all heads are local
    (or all global) every head gets the budget. Entries that do not divide go to the first heads.

    Args:
        local: [B, G] bool.
        window: [B, 1] int, entries of a local head, at most `budget`.
        budget: [B, 1] int, mean entries per head.
        limit: [B, 1] int, the most that a head can hold; the budget where that is more.

    Returns:
        [B, G] int32; every row sums to exactly `budget * G`.
    """
    total = budget * local.shape[1]
    base = torch.where(local, window, 0)  # [B, G]
    some_global = (~local).any(-1, keepdim=True)
    # Where the budget is above the limit nothing has to leave; it stays what every head gets.
    targets = base + _shares(total - base.sum(-1, keepdim=True), ~local).minimum(limit.maximum(budget))
    left = total - targets.sum(-1, keepdim=True)
    targets = targets + _shares(left, local)
    return torch.where(some_global, targets, budget).to(torch.int32)


def _shares(amount: Tensor, who: Tensor) -> Tensor:
    """Divide `amount` [B, 1] among the True entries of `who` [B, G], largest shares first."""
    count = who.sum(-1, keepdim=True).clamp(min=1)
    rank = who.cumsum(-1) - 1
    return torch.where(who, amount // count + (rank < amount % count), 0)
