# SPDX-License-Identifier: Apache-2.0
"""Options asked for on the command line: (method, or None for every method that has it; name; value)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

AskedOption = tuple[str | None, str, Any]


def asked_options(asked: Sequence[AskedOption], method: str, known: Collection[str]) -> dict[str, Any]:
    """What was asked for one method, which has the options `known`."""
    return {name: value for who, name, value in asked if who == method or (who is None and name in known)}


def check_asked_options(asked: Sequence[AskedOption], known: dict[str, Collection[str]]) -> None:
    """Refuse options that no method of the evaluation has.

    Args:
        asked: the options.
        known: option names of every compared method.

    Raises:
        ValueError: naming the option.
    """
    for who, name, _ in asked:
        if who is not None and who not in known:
            raise ValueError(f"option {who}.{name} belongs to a method that is not evaluated: add {who!r}")
        if who is None and not any(name in names for names in known.values()):
            raise ValueError(f"none of the methods {', '.join(known) or 'none'} has an option {name!r}")
