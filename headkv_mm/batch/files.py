# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, even when the process is killed or the machine stops."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes, *, staging: Path) -> None:
    """Replace a file by a new one in one step.

    Args:
        path: the file.
        data: what it will hold.
        staging: a folder on the same file system that is emptied by the next run, whatever happens now.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    staged = staging / f"{uuid.uuid4().hex}-{path.name}"
    try:
        write_synced(staged, data)
        os.replace(staged, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def to_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, always the same for the same record."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def to_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """Records as a .jsonl file."""
    return "".join(map(to_line, records)).encode("utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; none if there is no file, and a line that was cut or damaged is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
