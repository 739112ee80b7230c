# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budgets import ImagePlan
from ..pieces import Allocation, Observed


@dataclass(frozen=True)
class Uniform:
    """Every head keeps the plan's budget.

    Attributes:
        window_rows: newest rows that are protected, as far as the budget allows (see `ImagePlan.window`).
    """

    window_rows: float = 1.0

    def __post_init__(self) -> None:
        if self.window_rows < 0:
            raise ValueError(f"window_rows must not be negative, got {self.window_rows}")

    def queries_needed(self, plan: ImagePlan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed) -> Allocation:
        """Targets and windows, the same everywhere."""
        plan, store = observed.plan, observed.store
        return Allocation(
            targets=torch.full_like(store.length, plan.budget),
            windows=torch.full_like(store.length, min(plan.window(self.window_rows), plan.budget)),
            row_totals=[plan.budget * store.kv_heads] * store.rows,
            largest=plan.budget,
        )
