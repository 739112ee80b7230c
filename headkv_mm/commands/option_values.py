# SPDX-License-Identifier: Apache-2.0
"""Reading numbers and options from the command line, with one-line errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

_WORDS = {"true": True, "false": False, "none": None}


def budget(text: str) -> float | int | str:
    """A budget: "1/6", "0.25", "64" or "512MiB"."""
    from headkv_mm.budgets import parse_budget

    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option(text: str) -> tuple[str, Any]:
    """A method's option: NAME=VALUE, where VALUE is a number, true, false, none or text."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write NAME=VALUE, such as tau=0.9")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def grid(text: str) -> tuple[int, int]:
    """A grid of image tokens: HEIGHTxWIDTH."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write HEIGHTxWIDTH in tokens, such as 16x16")
    return int(height), int(width)


def image_rows(text: str) -> tuple[int, ...]:
    """A grid of image tokens with the tokens of a row, newline included, where they are more: HEIGHTxWIDTH[xROW]."""
    sides = text.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not understood: write HEIGHTxWIDTH in tokens, such as 16x16, or HEIGHTxWIDTHxROW where "
            "newlines make a row longer, such as 48x48x49"
        )
    return tuple(map(int, sides))


def class_labels(text: str) -> list[int]:
    """Class labels: whole numbers with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write whole numbers, such as 207,360")
    return [int(part) for part in parts]


def whole_number(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return read
