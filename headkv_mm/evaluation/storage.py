# SPDX-License-Identifier: Apache-2.0
"""Files of an evaluation: written whole or not at all, and never mixed with those of other settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DIGITS = 7  # float32 results carry no more


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically: lists of numbers on one line, floats rounded to what they are worth.

    Raises:
        ValueError: for a number that is not finite.
    """
    write_text(path, _dump(_rounded(content)) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON ({error.msg} in line {error.lineno}): delete it to run it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: delete it to run it again")
    return content


def write_tokens(path: Path, tokens: Tensor, settings: Mapping[str, Any]) -> None:
    """Write image tokens [captions, N] with the settings that they came from."""
    header = {"settings": json.dumps(_rounded(settings), sort_keys=True)}
    write_atomically(path, lambda temporary: save_file({"tokens": tokens.to(torch.int32)}, temporary, metadata=header))


def read_tokens(path: Path, settings: Mapping[str, Any]) -> Tensor | None:
    """Image tokens int64 [captions, N]; None if there is no such file.

    Raises:
        ValueError: if it is unreadable or came from other settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
            tokens: Tensor = file.get_tensor("tokens").long()
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to generate its images again") from error
    check_same(path, found, settings)
    return tokens


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse results of other settings.

    Raises:
        ValueError: naming what differs.
    """
    left, right = _flat(_rounded(found)), _flat(_rounded(wanted))
    differing = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
    if differing:
        pairs = ", ".join(f"{name} {left.get(name)!r} instead of {right.get(name)!r}" for name in differing)
        raise ValueError(
            f"{path} holds a result of other settings ({pairs}); use another --output folder, or delete it"
        )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a result is {value}, which no JSON file can hold")
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _dump(value: Any, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = (f"{inner}{json.dumps(name)}: {_dump(item, inner)}" for name, item in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(f"{inner}{_dump(item, inner)}" for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
