# SPDX-License-Identifier: Apache-2.0
"""Compression: which method, how much, with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budgets import Budget, check_budget
from .registry import Method, Pieces, get_method

DEFAULT_BUDGET = 1 / 6


@dataclass(frozen=True, init=False)
class Compression:
    """A validated, immutable statement of what to compress and how.

    Attributes:
        method: a registered name, see `headkv_mm.methods()`.
        budget: a fraction in (0, 1] of the entries that a full cache would hold; a whole number of entries per KV
            head, window included; or bytes as text ("512MiB"). Of an image the condition tokens are always kept and
            come on top; of a text everything counts, and a fraction grows with it.
        options: what differs from the method's defaults, as sorted (name, value) pairs.

    Raises:
        ValueError: for an unknown method or option, or a budget outside its range.
        TypeError: for a budget that is neither a number nor text.
    """

    method: str
    budget: Budget
    options: tuple[tuple[str, Any], ...]

    def __init__(self, method: str = "headkv", *, budget: Budget = DEFAULT_BUDGET, **options: Any) -> None:
        if not isinstance(method, str):
            raise TypeError(f"method must be a name such as 'headkv', got {type(method).__name__}")
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "budget", check_budget(budget))
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        self.resolve()

    def resolve(self) -> Method:
        """The method with the options set."""
        return get_method(self.method).with_options(self.kwargs)

    def pieces(self, kind: str) -> Pieces | None:
        """The method's pieces for "image" or "text", options set; None for the stock cache.

        Raises:
            ValueError: if the method does not serve that kind, or an option is for the other kind only.
        """
        pieces = self.resolve().pieces(kind)
        if pieces is not None:
            foreign = sorted(set(self.kwargs) - set(pieces.options) - {"scorer", "allocator", "selector", "schedule"})
            if foreign:
                raise ValueError(
                    f"option {', '.join(map(repr, foreign))} of method {self.method!r} does not serve {kind}; "
                    f"its options there are: {', '.join(sorted(pieces.options))}"
                )
        return pieces

    @property
    def kwargs(self) -> dict[str, Any]:
        """The options as a dict."""
        return dict(self.options)

    def to_dict(self) -> dict[str, Any]:
        """A dict that `parse` accepts."""
        return {"method": self.method, "budget": self.budget, **self.kwargs}

    @classmethod
    def parse(
        cls, value: str | Mapping[str, Any] | Compression | None, *, budget: Budget | None = None, **options: Any
    ) -> Compression:
        """Read any accepted form: a name, a dict with "method", a Compression, or None for the stock cache.

        `budget` and `options` replace what the value says.

        Raises:
            TypeError: for any other type.
            ValueError: see the class.
        """
        if value is None:
            merged: dict[str, Any] = {"method": "none"}
        elif isinstance(value, Compression):
            merged = value.to_dict()
        elif isinstance(value, str):
            merged = {"method": value}
        elif isinstance(value, Mapping):
            if "method" not in value:
                raise ValueError(
                    "a compression given as a dict needs the key 'method', for example {'method': 'headkv'}"
                )
            merged = dict(value)
        else:
            raise TypeError(
                f"compression must be a method name, a dict, a Compression or None, got {type(value).__name__}"
            )
        if budget is not None:
            merged["budget"] = budget
        merged.update(options)
        if merged.get("budget", ...) is None:
            del merged["budget"]
        return cls(merged.pop("method"), **merged)

    def __str__(self) -> str:
        budget = f"{self.budget:.4g}" if isinstance(self.budget, float) else str(self.budget)
        text = ", ".join([budget, *(f"{name}={value}" for name, value in self.options)])
        return f"{self.method}({text})"
