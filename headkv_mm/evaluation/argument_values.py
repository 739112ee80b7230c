# SPDX-License-Identifier: Apache-2.0
"""Reading the arguments of `headkv-mm evaluate`, with one-line errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("nothing is named: give some names, separated by commas")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas."""
    read = whole(1)
    found = tuple(read(part.strip()) for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError("no number is given: give some, separated by commas")
    return found


def budgets(text: str) -> tuple[Any, ...]:
    """Budgets separated by commas, as shares or entries per KV head."""
    from headkv_mm.budgets import parse_budget

    try:
        found = tuple(parse_budget(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if any(isinstance(budget, str) for budget in found):
        raise argparse.ArgumentTypeError("a budget in bytes depends on the batch: give shares or entries per KV head")
    if not found:
        raise argparse.ArgumentTypeError("no budget is given: give some, separated by commas")
    return found


def option(text: str) -> tuple[str | None, str, Any]:
    """Read "tau=0.8" or "headkv.tau=0.8"; values are JSON, or plain text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE or METHOD.NAME=VALUE, got {text!r}")
    method, _, option = name.rpartition(".")
    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    try:
        parsed = words[value] if value in words else json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return method or None, option, parsed


def whole(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return number

    return read
