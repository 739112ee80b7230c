# SPDX-License-Identifier: Apache-2.0
"""The images of a list of prompts, and the batches they are drawn in."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from .prompts import Prompt, PromptList

_SEEDS = 2**63


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        slot: place in the list, the places of bad lines included.
        name: file name without suffix.
        prompt: the line it comes from.
        seed: its own seed.
    """

    slot: int
    name: str
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Unit:
    """Images that are drawn together.

    Which images share a unit depends on the list and the batch size only. Sums over a batch may be rounded in another
    order when the batch is another; so an image comes out the same to the last bit, whichever process draws it, and
    whatever was finished before.

    Attributes:
        jobs: all images of the unit.
        wanted: names of those that are missing.
    """

    jobs: tuple[Job, ...]
    wanted: frozenset[str]


def make_jobs(prompts: PromptList, *, seed: int, num_images: int) -> list[Job]:
    """The images of a list, in order.

    Args:
        prompts: the list.
        seed: of the first image of a prompt that brings no seed; image j has `seed + j`.
        num_images: images per prompt. With several, the seed is part of the name.
    """
    jobs = []
    for index, line in enumerate(prompts.lines):
        if not isinstance(line, Prompt):
            continue
        first = seed if line.seed is None else line.seed
        for image in range(num_images):
            own = (first + image) % _SEEDS
            name = line.id if num_images == 1 else f"{line.id}-seed{own}"
            jobs.append(Job(slot=index * num_images + image, name=name, prompt=line, seed=own))
    return jobs


def make_units(jobs: Iterable[Job], batch_size: int) -> list[Unit]:
    """Put images that are drawn together into units of at most `batch_size`.

    A bad line keeps its place in its unit: mending it later changes no other unit. Texts and classes never share a
    unit.
    """
    groups: dict[tuple[int, bool], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.slot // batch_size, job.prompt.prompt is None), []).append(job)
    return [Unit(tuple(group), frozenset(job.name for job in group)) for group in groups.values()]


def missing_units(units: Iterable[Unit], done: Collection[str]) -> list[Unit]:
    """The units in which an image is missing, with the names of those that are."""
    left = (replace(unit, wanted=unit.wanted - frozenset(done)) for unit in units)
    return [unit for unit in left if unit.wanted]
