# SPDX-License-Identifier: Apache-2.0
"""Budgets by a table of layer errors that was measured once for the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from .uniform import check_windows


@dataclass(frozen=True)
class LayerTableShares:
    """Layers whose output suffers more from eviction keep more (arXiv 2508.02401, CompressKV).

    Of B entries per head on the average over L layers, window included, layer l keeps
    `clip(least + e_l (B L - least L), least, most B)`, where the errors e of the table sum to 1. What the limits leave
    over or ask for too much is made up by single entries in the order of the errors, so that all layers together keep
    exactly what they would with equal budgets. All heads of a layer keep the same.

    Attributes:
        layer_table: file of a layer table; None for the one that ships for the model.
        least: entries that every layer keeps, where the budget suffices.
        most: the most that a layer may keep, in budgets.
        window: newest tokens of a text that are protected, at most half of the budget.
        layer_errors: errors of one's own in place of a table's, by compressed layer.
    """

    layer_table: str | None = None
    least: int = 32
    most: float = 3.0
    window: int = 8
    layer_errors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_windows(self.window, 0.0)
        if not isinstance(self.least, int) or isinstance(self.least, bool) or self.least < 1:
            raise ValueError(f"least must be a whole number of entries, at least 1, got {self.least!r}")
        if self.most < 1.0:
            raise ValueError(f"most must be at least 1, got {self.most}")
        if self.layer_table is not None and not isinstance(self.layer_table, str):
            raise ValueError(f"layer_table must be the name of a file, got {self.layer_table!r}")
        if self.layer_errors is not None:
            object.__setattr__(self, "layer_errors", checked_errors(self.layer_errors))

    def for_model(self, model_or_config: Any) -> LayerTableShares:
        """The same with the errors of the table, if it has none yet.

        Raises:
            ValueError: if there is no table for this model, or the table is of another one.
            FileNotFoundError: if there is no such file.
        """
        if self.layer_errors is not None:
            return self
        from ..layer_tables import layer_table_for

        return replace(self, layer_errors=layer_table_for(model_or_config, self.layer_table).errors)

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """The layer's part of the table.

        Raises:
            ValueError: without errors, or for those of a model with another number of layers.
        """
        plan, heads, budgets = observed.plan, observed.heads, observed.row_budgets
        place, errors = plan.place, self.layer_errors
        if errors is None:
            raise ValueError("this allocator has no errors; a HeadKVCache takes them from the model's layer table")
        if len(errors) != place.count:
            raise ValueError(f"the errors are of {len(errors)} layers, and the model has {place.count} to compress")
        windows = plan.windows_of(budgets, tokens=self.window, rows=0.0)
        targets, before, protected = [], [], []
        for budget, window, seen in zip(budgets, windows, observed.row_seen, strict=True):
            layers = layer_shares(errors, budget, plan.limit(seen), self.least, self.most)
            targets.append(layers[place.index])
            before.append(heads * sum(layers[: place.index]))
            protected.append(min(window, layers[place.index]))
        return Allocation(
            targets=observed.per_row(targets).expand(-1, heads).contiguous(),
            windows=observed.per_row(protected).expand(-1, heads).contiguous(),
            row_totals=[target * heads for target in targets],
            largest=max(targets),
            row_before=before,
        )


@lru_cache(maxsize=512)
def layer_shares(errors: tuple[float, ...], budget: int, limit: int, least: int, most: float) -> tuple[int, ...]:
    """Entries per head by layer, whose sum is exactly `budget` times the number of layers.

    Args:
        errors: by layer, not negative.
        budget: mean entries.
        limit: the most that a layer can hold; the budget where that is more.
        least, most: see `LayerTableShares`.
    """
    count, total = len(errors), sum(errors)
    low, high = min(least, budget), max(min(int(most * budget), limit), budget)
    pool = (budget - low) * count
    shares = [min(max(low + int((error / total if total > 0 else 1 / count) * pool), low), high) for error in errors]
    order = sorted(range(count), key=lambda layer: -errors[layer])
    left = budget * count - sum(shares)
    while left:
        # What is missing goes to the layers with the largest errors first, what is too much comes from the smallest.
        part = -(-abs(left) // count)
        for layer in order if left > 0 else reversed(order):
            room = high - shares[layer] if left > 0 else low - shares[layer]
            step = max(min(part, room, left), 0) if left > 0 else min(max(-part, room, left), 0)
            shares[layer] += step
            left -= step
            if not left:
                break
    return tuple(shares)


def checked_errors(errors: Sequence[float]) -> tuple[float, ...]:
    """Errors by layer.

    Raises:
        ValueError: if they are not numbers that are finite, not negative and not all zero.
    """
    numbers = isinstance(errors, Sequence) and not isinstance(errors, str)
    if not numbers or not all(isinstance(error, (int, float)) and not isinstance(error, bool) for error in errors):
        raise ValueError("layer errors must be a list of numbers, one for every layer")
    if not errors or not all(math.isfinite(error) and error >= 0 for error in errors) or not sum(errors) > 0:
        raise ValueError("layer errors must be finite numbers that are not negative and not all zero")
    return tuple(float(error) for error in errors)
