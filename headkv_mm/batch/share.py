# SPDX-License-Identifier: Apache-2.0
"""What one process does: it draws its units, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .folder import ImageFolder
from .jobs import Job, Unit
from .records import Drawn, Failure

Draw = Callable[[Sequence[Job]], tuple[list[Drawn], dict[str, Any]]]
"""Draws some images together and gives their files in the same order, and what it took.

Raises:
    ValueError: if one of them cannot be drawn.
"""

Check = Callable[[Job], None]
"""Looks at a job without drawing it.

Raises:
    ValueError: if the model cannot draw it.
"""


@dataclass(frozen=True)
class Share:
    """What a process did.

    Attributes:
        drawn: images finished.
        failures: what could not be drawn.
    """

    drawn: int
    failures: tuple[Failure, ...]


def draw_share(folder: ImageFolder, units: Iterable[Unit], *, check: Check, draw: Draw, settings_hash: str) -> Share:
    """Draw units and finish each in the folder.

    What cannot be drawn is written down and stops nothing else. If a batch cannot be drawn, its images are tried one
    by one, so that only those fail that are to blame.
    """
    drawn = 0
    failures: list[Failure] = []

    def attempt(jobs: Sequence[Job], wanted: frozenset[str]) -> None:
        nonlocal drawn
        images, timing = draw(jobs)
        images = [image for image in images if image.job.name in wanted]
        folder.commit(images, settings_hash, {"images": [image.job.name for image in images], **timing})
        drawn += len(images)

    for unit in units:
        jobs = []
        for job in unit.jobs:
            try:
                check(job)
                jobs.append(job)
            except ValueError as error:
                failures.append(_failure(job, error))
        wanted = [job for job in jobs if job.name in unit.wanted]
        if not wanted:
            continue
        try:
            attempt(jobs, unit.wanted)
        except ValueError as error:
            if len(jobs) == 1:
                failures.append(_failure(jobs[0], error))
                continue
            for job in wanted:
                try:
                    attempt([job], unit.wanted)
                except ValueError as reason:
                    failures.append(_failure(job, reason))
    return Share(drawn, tuple(dict.fromkeys(failures)))


def _failure(job: Job, error: ValueError) -> Failure:
    text = " ".join(str(error).split()) or type(error).__name__
    return Failure(line=job.prompt.line, id=job.prompt.id, error=text)
