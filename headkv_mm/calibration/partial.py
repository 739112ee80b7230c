# SPDX-License-Identifier: Apache-2.0
"""What a calibration has found so far, on disk, so that it can go on after a break."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headkv_mm.evaluation.storage import read_json, write_text

FORMAT = "headkv-mm heads in progress"


@dataclass
class Progress:
    """Sums over the prompts so far.

    Attributes:
        done: prompts tried.
        answered: prompts answered right.
        kv_heads: per layer; 0 until known.
        sums: [L][H], sums over the prompts that were answered right.
    """

    done: int = 0
    answered: int = 0
    kv_heads: int = 0
    sums: list[list[float]] = field(default_factory=list)


def load_progress(path: Path, settings: Mapping[str, Any]) -> Progress:
    """Read what an earlier calibration of heads left, or begin; see `load_partial`."""
    found = load_partial(path, FORMAT, settings)
    try:
        return Progress() if found is None else Progress(**found)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: delete it to begin anew") from error


def save_progress(path: Path, settings: Mapping[str, Any], progress: Progress) -> None:
    """Write the file whole; floats are kept to the last bit."""
    save_partial(path, FORMAT, settings, asdict(progress))


def load_partial(path: Path, format: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what an earlier run of a calibration left.

    Args:
        path: the file.
        format: of which calibration it must be.
        settings: of this run, as JSON types.

    Returns:
        What `save_partial` was given, or None if there is no file.

    Raises:
        ValueError: if the file is of other settings, of another calibration, or unreadable.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != format:
        raise ValueError(f"{path} is no unfinished calibration of this kind: delete it, or choose another --output")
    found = content.get("settings")
    if found != settings:
        old = found if isinstance(found, dict) else {}
        names = sorted({*old, *settings})
        differing = [f"{name} {old.get(name)!r}" for name in names if old.get(name) != settings.get(name)]
        raise ValueError(
            f"{path} was begun with other settings ({', '.join(differing)}): repeat them to go on, or delete it"
        )
    progress = content.get("progress")
    if not isinstance(progress, dict):
        raise ValueError(f"{path} is damaged: delete it to begin anew")
    return progress


def save_partial(path: Path, format: str, settings: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Write the file whole; floats are kept to the last bit."""
    content = {"format": format, "settings": dict(settings), "progress": dict(progress)}
    write_text(path, json.dumps(content, allow_nan=False) + "\n")
