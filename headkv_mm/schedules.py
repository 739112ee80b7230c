# SPDX-License-Identifier: Apache-2.0
"""Schedules: when entries are evicted. They count tokens on the host and never ask the device."""

from __future__ import annotations

from dataclasses import dataclass

from .budgets import ImagePlan
from .plan import Plan


@dataclass(frozen=True)
class EachRow:
    """Right after the last token of an image row (arXiv 2512.04857).

    Attributes:
        first_eviction_rows: rows decoded with everything kept; None: until the budget is full.
    """

    first_eviction_rows: int | None = None

    def __post_init__(self) -> None:
        if self.first_eviction_rows is not None:
            _check_rows("first_eviction_rows", self.first_eviction_rows)

    def first(self, plan: Plan) -> int:
        """Image tokens before the first eviction: whole rows that fill the budget, or what was asked for."""
        image = _image(plan)
        if self.first_eviction_rows is None:
            return -(-image.budget // image.row) * image.row
        return _rows_before_end("first_eviction_rows", self.first_eviction_rows, image)

    def due(self, before: int, after: int, plan: Plan) -> bool:
        """True when a row ended as the count of image tokens went from `before` to `after`."""
        return _step_ended(before, after, plan) and after >= self.first(plan)


@dataclass(frozen=True)
class AfterGrouping:
    """Right after the last token of an image row, once the heads are grouped (arXiv 2605.20600).

    Attributes:
        grouping_rows: rows decoded with everything kept before the head types are decided (T_g of the paper, in rows).
    """

    grouping_rows: int = 4

    def __post_init__(self) -> None:
        _check_rows("grouping_rows", self.grouping_rows)

    def first(self, plan: Plan) -> int:
        """Image tokens before the grouping, which is the first eviction too."""
        return _rows_before_end("grouping_rows", self.grouping_rows, _image(plan))

    def due(self, before: int, after: int, plan: Plan) -> bool:
        """True when a row ended as the count of image tokens went from `before` to `after`."""
        return _step_ended(before, after, plan) and after >= self.first(plan)


@dataclass(frozen=True)
class EachInterval:
    """At the end of a text's prompt, and then every `interval` decoded tokens, wherever a row is over its budget.

    Attributes:
        interval: decoded tokens between two evictions; None: what suits the budget, see `TextPlan`.
    """

    interval: int | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and (not isinstance(self.interval, int) or self.interval < 1):
            raise ValueError(f"interval must be a whole number of tokens, at least 1, got {self.interval!r}")

    def first(self, plan: Plan) -> int:
        """At once."""
        return 0

    def due(self, before: int, after: int, plan: Plan) -> bool:
        """True when an interval ended as the count of decoded tokens went from `before` to `after`."""
        return _step_ended(before, after, plan)


def _image(plan: Plan) -> ImagePlan:
    if not isinstance(plan, ImagePlan):
        raise TypeError(f"this schedule counts image rows, and the plan is a {type(plan).__name__}; use EachInterval")
    return plan


def _check_rows(name: str, rows: int) -> None:
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"{name} must be a whole number of rows, at least 1, got {rows!r}")


def _rows_before_end(name: str, rows: int, plan: ImagePlan) -> int:
    if rows * plan.row >= plan.tokens:
        raise ValueError(
            f"{name}={rows} keeps all {plan.tokens // plan.row} rows of the image, so nothing would be compressed; "
            f"use at most {plan.tokens // plan.row - 1}"
        )
    return rows * plan.row


def _step_ended(before: int, after: int, plan: Plan) -> bool:
    return after // plan.step > before // plan.step
