# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: name -> scorer x allocator x selector x schedule.

A method of one's own is one dataclass for the piece that is new and one call:

    register_method("newest-first", scorer=Recency(), allocator=Uniform(), selector=Stratified(0.0), schedule=EachRow(),
                    description="...", source="...")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .allocators import HeadType, Uniform
from .pieces import Allocator, Schedule, Scorer, Selector
from .schedules import AfterGrouping, EachRow
from .scorers import Recency, RecentQueries
from .selectors import Stratified

_PIECES = ("scorer", "allocator", "selector", "schedule")


@dataclasses.dataclass(frozen=True)
class Method:
    """A named composition of four pieces.

    Attributes:
        name: how users call it.
        scorer, allocator, selector, schedule: see `headkv_mm.pieces`; None in all four for the stock cache.
        description: one line.
        source: the paper.
    """

    name: str
    scorer: Scorer | None
    allocator: Allocator | None
    selector: Selector | None
    schedule: Schedule | None
    description: str = ""
    source: str = ""

    @property
    def compresses(self) -> bool:
        """False for the stock cache."""
        return self.scorer is not None

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default: the fields of the four pieces."""
        return {
            field.name: getattr(piece, field.name)
            for piece in (self.scorer, self.allocator, self.selector, self.schedule)
            if piece is not None
            for field in dataclasses.fields(piece)  # type: ignore[arg-type]
            if field.init
        }

    def with_options(self, options: Mapping[str, Any]) -> Method:
        """The method with options set, or whole pieces swapped (`scorer=...`, `allocator=...`, ...).

        An option that several pieces have is set in all of them.

        Raises:
            ValueError: for an unknown option, or a value that its piece refuses.
        """
        method = self
        swapped = {name: piece for name, piece in options.items() if name in _PIECES}
        if swapped:
            method = dataclasses.replace(method, **swapped)
        known = method.options
        plain = {name: value for name, value in options.items() if name not in _PIECES}
        unknown = sorted(set(plain) - set(known))
        if unknown:
            expected = ", ".join(sorted(known)) if known else "none"
            raise ValueError(
                f"method {self.name!r} has no option {', '.join(map(repr, unknown))}; its options are: {expected}"
            )
        changed: dict[str, Any] = {}
        for name in _PIECES:
            piece = getattr(method, name)
            if piece is None:
                continue
            own = {field.name for field in dataclasses.fields(piece)} & set(plain)
            if own:
                changed[name] = _replace(piece, {option: plain[option] for option in own})
        return dataclasses.replace(method, **changed)


def _replace(piece: Any, options: dict[str, Any]) -> Any:
    for name, value in options.items():
        default = getattr(piece, name)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, (int, float)) and not isinstance(default, bool) and not number:
            raise ValueError(f"{name} must be a number like {default!r}, got {value!r}")
        if isinstance(default, str) and not isinstance(value, str):
            raise ValueError(f"{name} must be text like {default!r}, got {value!r}")
    return dataclasses.replace(piece, **options)


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    scorer: Scorer | None,
    allocator: Allocator | None,
    selector: Selector | None,
    schedule: Schedule | None,
    description: str = "",
    source: str = "",
) -> Method:
    """Register a method under a name.

    Raises:
        ValueError: if the name is taken, or only some of the pieces are given.
    """
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered already; choose another name")
    pieces = (scorer, allocator, selector, schedule)
    if any(piece is None for piece in pieces) and any(piece is not None for piece in pieces):
        raise ValueError(f"method {name!r} needs all of scorer, allocator, selector and schedule")
    method = Method(name, scorer, allocator, selector, schedule, description, source)
    _METHODS[name] = method
    return method


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; registered methods are: {', '.join(methods())}")
    return _METHODS[name]


def methods() -> list[str]:
    """Names of the registered methods."""
    return list(_METHODS)


register_method(
    "none",
    scorer=None,
    allocator=None,
    selector=None,
    schedule=None,
    description="The stock cache: everything is kept.",
)
register_method(
    "headkv",
    scorer=RecentQueries(),
    allocator=HeadType(),
    selector=Stratified(),
    schedule=AfterGrouping(),
    description="Head types found online; local heads keep a window, global ones the rest; stratified eviction.",
    source="arXiv 2605.20600",
)
register_method(
    "lines",
    scorer=RecentQueries(score="softmax"),
    allocator=Uniform(),
    selector=Stratified(strata_ratio=0.0, anchor_rows=1.0),
    schedule=EachRow(),
    description="The same budget for every head; first and last rows stay, the rest by the last row's attention.",
    source="arXiv 2512.04857",
)
register_method(
    "streaming",
    scorer=Recency(),
    allocator=Uniform(),
    selector=Stratified(strata_ratio=0.0),
    schedule=EachRow(),
    description="The condition and the newest tokens.",
    source="arXiv 2309.17453",
)
