# SPDX-License-Identifier: Apache-2.0
"""What is written down about an image, and about one that could not be drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .jobs import Job

Record = dict[str, Any]
"""A line of manifest.jsonl."""

_IDENTITY = ("id", "prompt", "class", "seed")


@dataclass(frozen=True)
class Drawn:
    """An image as it came out.

    Attributes:
        job: what was to be drawn.
        png: the file's bytes.
        details: more for its record; the same in every run, so no times.
    """

    job: Job
    png: bytes = field(repr=False)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An image that could not be drawn, or a line that could not be read.

    Attributes:
        line: of the list, from 1.
        id: of the prompt; None where the line gave none.
        error: why.
    """

    line: int
    id: str | None
    error: str

    def to_dict(self) -> Record:
        """A line of failed.jsonl."""
        return asdict(self)


def identity(job: Job) -> Record:
    """What an image is: the same for the job and for the record of the finished image."""
    return {"id": job.prompt.id, "prompt": job.prompt.prompt, "class": job.prompt.label, "seed": job.seed}


def make_record(drawn: Drawn, settings_hash: str) -> Record:
    """The record of a finished image."""
    return {
        **identity(drawn.job),
        "file": f"{drawn.job.name}.png",
        "file_bytes": len(drawn.png),
        "sha256": hashlib.sha256(drawn.png).hexdigest(),
        "settings": settings_hash,
        **drawn.details,
    }


def record_name(record: Record) -> str | None:
    """The file name without suffix that a record speaks of; None for a record that is damaged."""
    file, size = record.get("file"), record.get("file_bytes")
    if not (isinstance(file, str) and file.endswith(".png") and isinstance(size, int)):
        return None
    if not all(name in record for name in (*_IDENTITY, "sha256", "settings")):
        return None
    inside = "/" not in file and "\\" not in file and not file.startswith(".")
    return file.removesuffix(".png") if inside else None


def difference(record: Record, job: Job) -> str | None:
    """What a finished image has that the job of that name has not, for a message; None if they are the same."""
    for name, wanted in identity(job).items():
        if record[name] != wanted:
            return f"{name} {record[name]!r}, now {wanted!r}"
    return None
