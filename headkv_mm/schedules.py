# SPDX-License-Identifier: Apache-2.0
"""Schedules: when entries are evicted. They count tokens on the host and never ask the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .budgets import ImagePlan
from .plan import Plan
from .text_plan import TextPlan


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
        regroup_rows: rows after which budgets are divided anew among the heads, from what is held by then; None: never,
            as in the paper. What is kept moves into regions of other sizes, one layer after the other.
    """

    grouping_rows: int = 4
    regroup_rows: int | None = None

    def __post_init__(self) -> None:
        _check_rows("grouping_rows", self.grouping_rows)
        if self.regroup_rows is not None:
            _check_rows("regroup_rows", self.regroup_rows)

    def first(self, plan: Plan) -> int:
        """Image tokens before the grouping, which is the first eviction too."""
        return _rows_before_end("grouping_rows", self.grouping_rows, _image(plan))

    def due(self, before: int, after: int, plan: Plan) -> bool:
        """True when a row ended as the count of image tokens went from `before` to `after`."""
        return _step_ended(before, after, plan) and after >= self.first(plan)

    def divides_anew(self, before: int, after: int, plan: Plan) -> bool:
        """Are budgets divided once more as the count went from `before` to `after`?"""
        if self.regroup_rows is None or before < self.first(plan):
            return False
        rounds = [(count // plan.step - self.grouping_rows) // self.regroup_rows for count in (before, after)]
        return rounds[1] > rounds[0]


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


@dataclass(frozen=True)
class TokenSelective(EachInterval):
    """As `EachInterval`, and only chosen tokens of a prompt go on after one layer of the model (arXiv 2502.01068).

    The layer that chooses ranks the tokens of a forward by the sum of its heads' scores. Those that go on are the
    newest `window`, the sinks, and the best others. Later layers never see the rest: their time and their entries are
    saved. Every forward of several tokens (a prompt, a chunk of one, a later turn) chooses among its own tokens.

    Attributes:
        tsp_ratio: share of a forward's tokens that go on. More do where the budget would otherwise not be filled.
        tsp_layer: the last layer that sees all tokens, from 0; None: that of the table, or half of the layers less one.
        tsp_least: a forward of so few tokens goes on whole, and no fewer ever go on.
        window: newest tokens that always go on.
        table: file that says the layer, see `headkv_mm.tsp_tables`.
    """

    tsp_ratio: float = 0.2
    tsp_layer: int | None = None
    tsp_least: int = 64
    window: int = 8
    table: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.tsp_ratio <= 1.0:
            raise ValueError(f"tsp_ratio must be a share in (0, 1], got {self.tsp_ratio}")
        _check_whole("tsp_layer", 0 if self.tsp_layer is None else self.tsp_layer, 0)
        _check_whole("tsp_least", self.tsp_least, 0)
        _check_whole("window", self.window, 1)
        if self.table is not None and not isinstance(self.table, str):
            raise ValueError(f"table must be the name of a file, got {self.table!r}")
        if self.table is not None and self.tsp_layer is not None:
            raise ValueError("table and tsp_layer both say which layer chooses; give one of them")

    def for_model(self, model_or_config: Any) -> TokenSelective:
        """The same with the layer that chooses.

        Raises:
            ValueError: for a layer that the model does not have, or a table of another model.
            FileNotFoundError: if there is no such table.
        """
        from .tsp_tables import layer_for

        return replace(self, tsp_layer=layer_for(model_or_config, self.tsp_layer, self.table), table=None)

    @property
    def chosen_layer(self) -> int:
        """The layer that chooses.

        Raises:
            ValueError: before `for_model`, unless it was given.
        """
        if self.tsp_layer is None:
            raise ValueError("which layer chooses is known only for a model: call for_model first")
        return self.tsp_layer

    def passing(self, plan: TextPlan, before: int, tokens: int) -> int:
        """How many of `tokens` that follow `before` others go on; all of them, or at least two."""
        entries, had = plan.entries(before + tokens), plan.entries(before)
        unfilled = entries - min(had, before)  # what later layers need to keep their budgets
        protected = self.window + max(plan.held_sinks(entries) - before, 0)
        return min(tokens, max(round(self.tsp_ratio * tokens), unfilled, protected, self.tsp_least, 2))


def _check_whole(name: str, number: int, least: int) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {number!r}")


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
