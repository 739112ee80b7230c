# SPDX-License-Identifier: Apache-2.0
"""Local heads keep a window, global heads keep more: budgets by head type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budgets import ImagePlan
from ..heads import is_local
from ..pieces import Allocation, Observed


@dataclass(frozen=True)
class HeadType:
    """Find local heads from the last row's attention, once per image, and give them a window only (arXiv 2605.20600).

    Attributes:
        tau: share of the attention mass that the local window must hold for a head to be local.
        window_rows: rows of the local window, which is also the protected window of global heads.
        grouping_queries: newest queries over which the mass is averaged; None: one row; 1: the paper's single query.
        include_condition: count attention to the condition as mass too.
        share_labels: one label per head for the whole batch, by majority, instead of one per row and head.
        redistribute: give what local heads leave to the global heads of the same layer and row, so that the layer
            holds exactly the uniform budget. False is the paper's form, which saves more.
    """

    tau: float = 0.9
    window_rows: float = 2.0
    grouping_queries: int | None = None
    include_condition: bool = False
    share_labels: bool = False
    redistribute: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}")
        if self.window_rows < 0:
            raise ValueError(f"window_rows must not be negative, got {self.window_rows}")
        if self.grouping_queries is not None and self.grouping_queries < 1:
            raise ValueError(f"grouping_queries must be at least 1 or None, got {self.grouping_queries}")

    def queries_needed(self, plan: ImagePlan) -> int:
        """One row of queries unless said otherwise."""
        return plan.row if self.grouping_queries is None else self.grouping_queries

    def allocate(self, observed: Observed) -> Allocation:
        """Label the heads of every row and divide the layer's budget."""
        plan, store = observed.plan, observed.store
        window = min(plan.window(self.window_rows), plan.budget)
        local = is_local(observed, window=window, tau=self.tau, include_condition=self.include_condition)
        if self.share_labels:
            local = (local.float().mean(0, keepdim=True) > 0.5).expand_as(local)
        if self.redistribute:
            targets = redistributed(local, window=window, budget=plan.budget, limit=plan.tokens)
            row_totals = [plan.budget * store.kv_heads] * store.rows
            largest = min(plan.tokens, plan.budget + (store.kv_heads - 1) * (plan.budget - window))
        else:
            targets = torch.where(local, window, plan.budget).to(torch.int32)
            row_totals, largest = targets.sum(-1).tolist(), plan.budget
        return Allocation(
            targets=targets,
            windows=torch.where(local, targets, window).to(torch.int32),
            row_totals=row_totals,
            largest=largest,
            local=local,
        )


def redistributed(local: Tensor, *, window: int, budget: int, limit: int) -> Tensor:
    """Divide `budget * G` entries of every row: local heads get the window, global heads the rest in equal shares.

    No head gets more than `limit`; what global heads cannot take goes back to the local ones. Where all heads are local
    (or all global) every head gets the budget. Entries that do not divide go to the first heads.

    Args:
        local: [B, G] bool.
        window: entries of a local head, at most `budget`.
        budget: mean entries per head, at most `limit`.

    Returns:
        [B, G] int32; every row sums to exactly `budget * G`.
    """
    total = budget * local.shape[1]
    base = torch.where(local, window, 0)  # [B, G]
    some_global = (~local).any(-1, keepdim=True)
    targets = base + _shares(total - base.sum(-1, keepdim=True), ~local).clamp(max=limit)
    left = total - targets.sum(-1, keepdim=True)
    targets = targets + _shares(left, local)
    return torch.where(some_global, targets, budget).to(torch.int32)


def _shares(amount: Tensor, who: Tensor) -> Tensor:
    """Divide `amount` [B, 1] among the True entries of `who` [B, G], largest shares first."""
    count = who.sum(-1, keepdim=True).clamp(min=1)
    rank = who.cumsum(-1) - 1
    return torch.where(who, amount // count + (rank < amount % count), 0)
