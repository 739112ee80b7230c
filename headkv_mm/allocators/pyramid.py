# SPDX-License-Identifier: Apache-2.0
"""Early layers keep more than late ones."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from .uniform import check_windows


@dataclass(frozen=True)
class Pyramid:
    """Budgets that fall linearly from the first layer to the last (arXiv 2406.02069, PyramidKV).

    Outside the sinks and the window, of b entries per head on the average, the last layer keeps b / beta and the first
    2 b - b / beta, as far as there are so many; then the line is flatter. All heads of a layer keep the same, and all
    layers together exactly what they would with equal budgets.

    Attributes:
        beta: steepness, at least 1; 1 is the uniform budget.
        window: newest tokens of a text that are protected, at most half of the budget.
    """

    beta: float = 20.0
    window: int = 32

    def __post_init__(self) -> None:
        if self.beta < 1.0:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        check_windows(self.window, 0.0)

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """The layer's place in the pyramid."""
        plan, heads, budgets = observed.plan, observed.heads, observed.row_budgets
        place = plan.place
        windows = plan.windows_of(budgets, tokens=self.window, rows=0.0)
        targets, before = [], []
        for budget, window, seen in zip(budgets, windows, observed.row_seen, strict=True):
            layers = pyramid(budget - window, plan.limit(seen) - window, place.count, self.beta)
            targets.append(window + layers[place.index])
            before.append(heads * (place.index * window + sum(layers[: place.index])))
        return Allocation(
            targets=observed.per_row(targets).expand(-1, heads).contiguous(),
            windows=observed.per_row(windows).expand(-1, heads).contiguous(),
            row_totals=[target * heads for target in targets],
            largest=max(targets),
            row_before=before,
        )


def pyramid(budget: int, limit: int, layers: int, beta: float) -> list[int]:
    """Entries per head by layer, falling linearly, whose sum is exactly `budget * layers`.

    Args:
        budget: mean entries.
        limit: the most that a layer can hold; the budget where that is more.
        layers: how many.
        beta: the last layer's budget is a `beta`-th of the mean.
    """
    if layers == 1:
        return [budget]
    most = min(2 * budget - Fraction(budget) / Fraction(beta), Fraction(max(limit, budget)))
    step = 2 * (most - budget) / (layers - 1)
    exact = [most - layer * step for layer in range(layers)]
    whole = [int(share) for share in exact]
    # Largest remainders; of equal ones the earlier layer's.
    order = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
    for layer in order[: budget * layers - sum(whole)]:
        whole[layer] += 1
    return whole
