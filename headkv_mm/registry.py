# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: name -> scorer x allocator x selector x schedule, for images and for texts.

A method of one's own is one dataclass for the piece that is new and one call:

    register_method("newest-first", text=Pieces(Recency(), Uniform(), Stratified(0.0), EachInterval()),
                    description="...", source="...")

The methods that come with the package are in `headkv_mm.builtin_methods`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .pieces import Allocator, ModelAllocator, Schedule, Scorer, Selector
from .plan import Plan

KINDS = ("image", "text")
PIECES = ("scorer", "allocator", "selector", "schedule")
"""The fields of `Pieces`."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A scorer, an allocator, a selector and a schedule, see `headkv_mm.pieces`."""

    scorer: Scorer
    allocator: Allocator
    selector: Selector
    schedule: Schedule

    def __post_init__(self) -> None:
        """Refuse pieces that do not go together.

        Raises:
            ValueError: naming them.
        """
        if self.selector.remembers and isinstance(self.allocator, ModelAllocator) and self.allocator.over_layers:
            raise ValueError(
                f"{type(self.selector).__name__} needs the last queries, which are gone when the layers have divided "
                "one budget among them; use scope='layer', or another selector"
            )

    def prompt_queries(self, plan: Plan) -> int:
        """How many of a prompt's last queries the decision at its end looks at, at least one."""
        return max(
            self.scorer.queries_needed(plan, decoding=False),
            self.allocator.queries_needed(plan),
            self.selector.queries_needed(plan, decoding=False),
            1,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default: the fields of the four pieces."""
        return {
            field.name: getattr(piece, field.name)
            for piece in (self.scorer, self.allocator, self.selector, self.schedule)
            for field in dataclasses.fields(piece)  # type: ignore[arg-type]
            if field.init
        }

    def with_options(self, options: Mapping[str, Any], kind: str) -> Pieces:
        """The pieces with every option set that they have, or swapped whole (`scorer=...`); others are ignored.

        A piece may be given by the name of a method, which has it for this kind: `scorer="keydiff"`; or by its own:
        `allocator="MassCurves"`.
        """
        changed: dict[str, Any] = {
            name: _piece_of(piece, name, kind) if isinstance(piece, str) else piece
            for name, piece in options.items()
            if name in PIECES
        }
        for name in PIECES:
            piece = changed.get(name, getattr(self, name))
            own = {field.name for field in dataclasses.fields(piece)} & set(options)
            changed[name] = _replace(piece, {option: options[option] for option in own}) if own else piece
        return Pieces(**changed)

    def for_model(self, model_or_config: Any) -> Pieces:
        """The pieces for one model: those that must know it, such as a head table's, have got to know it.

        Raises:
            ValueError: if a piece does not suit the model.
        """
        pieces = {name: getattr(self, name) for name in PIECES}
        bound = {
            name: piece.for_model(model_or_config) for name, piece in pieces.items() if hasattr(piece, "for_model")
        }
        return dataclasses.replace(self, **bound)


@dataclasses.dataclass(frozen=True)
class Method:
    """A named method: its pieces for images, for texts, or for both.

    Attributes:
        name: how users call it.
        image, text: the pieces; None where the method does not serve that kind. Both are None for the stock cache.
        description: one line.
        source: the paper.
    """

    name: str
    image: Pieces | None = None
    text: Pieces | None = None
    description: str = ""
    source: str = ""

    @property
    def compresses(self) -> bool:
        """False for the stock cache."""
        return self.image is not None or self.text is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it serves: "image", "text", or both; the stock cache serves everything."""
        return tuple(kind for kind in KINDS if not self.compresses or getattr(self, kind) is not None)

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default, for images and texts together; where both have one, the image's default."""
        options: dict[str, Any] = {}
        for pieces in (self.text, self.image):
            options.update(pieces.options if pieces is not None else {})
        return options

    def pieces(self, kind: str) -> Pieces | None:
        """The pieces for "image" or "text"; None for the stock cache.

        Raises:
            ValueError: if the method does not serve that kind.
        """
        if kind not in self.kinds:
            raise ValueError(
                f"method {self.name!r} serves {' and '.join(self.kinds)} only; methods for {kind} are: "
                f"{', '.join(methods(kind))}"
            )
        found: Pieces | None = getattr(self, kind)
        return found

    def with_options(self, options: Mapping[str, Any]) -> Method:
        """The method with options set, or whole pieces swapped (`scorer=...`, `allocator=...`, ...).

        A swapped piece is an object, or the name of a method that has it. An option that several pieces have is set in
        all of them.

        Raises:
            ValueError: for an unknown option, or a value that its piece refuses.
        """
        if not options:
            return self
        swapped = {
            kind: pieces.with_options(options, kind) for kind in KINDS if (pieces := getattr(self, kind)) is not None
        }
        method = dataclasses.replace(self, **swapped)
        unknown = sorted(set(options) - set(method.options) - (set(PIECES) if self.compresses else set()))
        if unknown:
            expected = ", ".join(sorted(method.options)) if method.options else "none"
            raise ValueError(
                f"method {self.name!r} has no option {', '.join(map(repr, unknown))}; its options are: {expected}"
            )
        return method


def _piece_of(method: str, name: str, kind: str) -> Any:
    """A piece of a registered method, or a piece by its own name as it is without options.

    Raises:
        ValueError: if there is neither, or the method does not serve that kind.
    """
    if method not in _METHODS:
        from . import allocators, schedules, scorers, selectors

        home = {"scorer": scorers, "allocator": allocators, "selector": selectors, "schedule": schedules}[name]
        own = [
            key for key, value in vars(home).items() if dataclasses.is_dataclass(value) and value.__module__ != __name__
        ]
        if method in own:
            return getattr(home, method)()
        raise ValueError(
            f"unknown method {method!r}; the {name} may be that of a method ({', '.join(methods(kind))}), or one by "
            f"its own name ({', '.join(sorted(own))})"
        )
    pieces = get_method(method).pieces(kind)
    if pieces is None:
        raise ValueError(f"method {method!r} has no {name}: it is the stock cache")
    return getattr(pieces, name)


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
    name: str, *, image: Pieces | None = None, text: Pieces | None = None, description: str = "", source: str = ""
) -> Method:
    """Register a method under a name.

    Args:
        name: how users call it.
        image, text: the pieces for either kind; one of them is enough, and both may be the same.
        description: one line.
        source: the paper.

    Raises:
        ValueError: if the name is taken, or no pieces are given.
    """
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered already; choose another name")
    method = Method(name, image, text, description, source)
    if not method.compresses:
        raise ValueError(f"method {name!r} needs pieces for images, for texts, or for both")
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


def methods(kind: str | None = None) -> list[str]:
    """Names of the registered methods.

    Args:
        kind: "image" or "text" for those that serve it; None for all.

    Raises:
        ValueError: for any other kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return [name for name, method in _METHODS.items() if kind is None or kind in method.kinds]


_METHODS["none"] = Method("none", description="The stock cache: everything is kept.")

from . import builtin_methods  # noqa: E402, F401 (registers, and needs everything above)
