# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from ..scorers.attention import check_window


@dataclass(frozen=True)
class Uniform:
    """Every head keeps its row's budget.

    Attributes:
        window: newest tokens of a text that are protected, at most half of the budget.
        window_rows: newest rows of an image that are protected, as far as the budget allows (see `ImagePlan.window`).
    """

    window: int = 32
    window_rows: float = 1.0

    def __post_init__(self) -> None:
        check_windows(self.window, self.window_rows)

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Targets and windows, the same everywhere."""
        heads, budgets = observed.heads, observed.row_budgets
        windows = observed.plan.windows_of(budgets, tokens=self.window, rows=self.window_rows)
        return Allocation(
            targets=observed.per_row(budgets).expand(-1, heads).contiguous(),
            windows=observed.per_row(windows).expand(-1, heads).contiguous(),
            row_totals=[budget * heads for budget in budgets],
            largest=max(budgets),
        )


def check_windows(window: int, window_rows: float) -> None:
    """Refuse windows that are none.

    Raises:
        ValueError: for a window of no tokens, or negative rows.
    """
    check_window(window)
    if window_rows < 0:
        raise ValueError(f"window_rows must not be negative, got {window_rows}")
