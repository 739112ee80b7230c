# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a user may write, and how many entries per KV head that is for an image."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from .image_grid import ImageGrid
from .plan import LayerPlace, Plan

Budget = float | int | str
"""A fraction in (0, 1], entries per KV head, or bytes such as "512MiB"."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*$")
_EXPECTED = (
    "expected a fraction in (0, 1] such as 1/6 or 0.25, a whole number of entries per KV head such as 64, "
    "or bytes such as '512MiB'"
)
_MARGIN = 2
"""Tokens beyond one row that are always kept: the neighbours above must be there when a row begins."""


def parse_budget(text: str) -> Budget:
    """Read a budget from text: "1/6", "0.25", "64" or "512MiB".

    Raises:
        ValueError: for anything else.
    """
    if _BYTES.match(text):
        return check_budget(text)
    try:
        value: Budget = int(text) if text.strip().isdecimal() else float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"budget {text!r} is not understood; {_EXPECTED}") from None
    return check_budget(value)


def check_budget(budget: object) -> Budget:
    """Return the budget if it is a valid one.

    Raises:
        TypeError: for a type that is none of float, int and str.
        ValueError: for zero, a negative number, a fraction above 1, or text that is not bytes.
    """
    if isinstance(budget, bool) or not isinstance(budget, (float, int, str)):
        raise TypeError(f"budget must be a number or text, got {type(budget).__name__}; {_EXPECTED}")
    if isinstance(budget, str):
        if budget_bytes(budget) <= 0:
            raise ValueError(f"budget {budget!r} holds no bytes; {_EXPECTED}")
        return budget
    if isinstance(budget, int):
        if budget < 1:
            raise ValueError(f"budget {budget} is too small; {_EXPECTED}")
        return budget
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget {budget:g} is outside (0, 1]; {_EXPECTED}")
    return budget


def budget_bytes(text: str) -> int:
    """Bytes of a text such as "512MiB".

    Raises:
        ValueError: if the text is not bytes.
    """
    match = _BYTES.match(text)
    if match is None:
        raise ValueError(f"budget {text!r} is not understood; {_EXPECTED}")
    return int(Fraction(match.group(1)) * _UNITS[match.group(2)])


@dataclass(frozen=True)
class ImagePlan(Plan):
    """How many entries a head keeps while one image is written.

    Attributes:
        tokens: image tokens N, newline tokens included.
        row: tokens of one raster row, R. Eviction happens every R tokens, so every region has room for R more than it
            keeps.
        budget: image entries kept per KV head right after an eviction, on the average over the heads of a layer.
        start: generated tokens that count as condition.
        place: the layer.
    """

    tokens: int
    row: int
    budget: int
    start: int = 0
    place: LayerPlace = field(default_factory=LayerPlace)

    @property
    def keeps_all(self) -> bool:
        """True if nothing ever has to leave: the cache is then a stock cache."""
        return self.budget >= self.tokens

    @property
    def step(self) -> int:
        """One raster row."""
        return self.row

    @property
    def smallest_window(self) -> int:
        """Recent tokens that no method may give up."""
        return self.row + _MARGIN

    def window(self, rows: float) -> int:
        """Recent tokens that are protected when `rows` are asked for: at most two thirds of the budget.

        The rest of the budget is what a method may choose. At the paper's budgets (arXiv 2605.20600: at least three
        rows) two rows are exactly two rows.
        """
        return max(self.smallest_window, min(round(rows * self.row), 2 * self.budget // 3))

    def window_of(self, budget: int, *, tokens: int, rows: float) -> int:
        """`window`, never more than the budget."""
        return min(self.window(rows), budget)

    def limit(self, seen: int) -> int:
        """The image's tokens."""
        return self.tokens


@dataclass(frozen=True)
class StorageCost:
    """Bytes that entries take, to divide a budget in bytes.

    Attributes:
        per_entry: one entry in every row, layer and KV head: keys, values and what is kept per slot.
        fixed: what does not depend on the number of entries, over all layers.
        condition: condition tokens of the longest row.
        queries: last queries that are held before an eviction, if there are so many since the one before.
        per_query: bytes of one such query in every row and layer.
    """

    per_entry: int
    fixed: int = 0
    condition: int = 0
    queries: int = 0
    per_query: int = 0

    def of(self, entries: int, step: int) -> int:
        """Bytes when every head keeps `entries` entries after the condition and has room for one more step."""
        held = self.fixed + min(self.queries, step) * self.per_query
        return held + (self.condition + entries + step) * self.per_entry


def image_plan(
    budget: Budget, grid: ImageGrid, cost: StorageCost | None = None, place: LayerPlace | None = None
) -> ImagePlan:
    """Turn a budget into entries per KV head.

    Args:
        budget: see `Budget`.
        grid: where the image lies.
        cost: what entries cost; needed for a budget in bytes only.
        place: the layer.

    Raises:
        ValueError: if the budget is below one row and two tokens.
    """
    if isinstance(budget, str):
        if cost is None:
            raise ValueError(f"budget {budget!r} is in bytes, which can be divided only when the batch is known")
        entries = (budget_bytes(budget) - cost.of(0, grid.row_stride)) // cost.per_entry
    elif isinstance(budget, float):
        entries = round(budget * grid.tokens)
    else:
        entries = budget
    plan = ImagePlan(
        tokens=grid.tokens,
        row=grid.row_stride,
        budget=min(entries, grid.tokens),
        start=grid.start,
        place=place or LayerPlace(),
    )
    smallest = min(plan.smallest_window, plan.tokens)
    if plan.budget < smallest:
        if cost is not None and isinstance(budget, str):
            needed = f"{cost.of(smallest, grid.row_stride)} bytes"
        else:
            needed = f"{smallest} entries or a fraction of {smallest / plan.tokens:.4f}"
        raise ValueError(
            f"budget {budget!r} leaves {max(plan.budget, 0)} of {plan.tokens} image tokens per KV head, fewer than one "
            f"row of {plan.row} and {_MARGIN} more, which must stay; use at least {needed}"
        )
    return plan
