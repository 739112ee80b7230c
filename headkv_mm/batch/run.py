# SPDX-License-Identifier: Apache-2.0
"""Draw a list of prompts into a folder, by all processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .folder import ImageFolder
from .jobs import Job, make_jobs, make_units, missing_units
from .processes import everywhere, from_main
from .progress import image_bar
from .prompts import PromptList
from .records import Failure, difference
from .settings import BatchSettings, differences
from .share import Check, Draw, Share, draw_share


@dataclass(frozen=True)
class Outcome:
    """What a run left in the folder.

    Attributes:
        images: images of the list that are there.
        drawn: those that this run drew.
        failures: what could not be drawn or read, in the order of the list.
    """

    images: int
    drawn: int
    failures: tuple[Failure, ...]


class _Start(NamedTuple):
    """What the main process found in the folder; `there`: images of the list in its manifest."""

    batch_size: int
    done: frozenset[str]
    there: int
    settings_hash: str
    notes: tuple[str, ...]


def draw_folder(
    state: Any,
    folder: ImageFolder,
    prompts: PromptList,
    *,
    settings: Callable[[int], BatchSettings],
    batch_size: int | None,
    default_batch_size: Callable[[], int],
    num_images: int,
    seed: int,
    check: Check,
    draw: Draw,
    show_progress: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Draw what is missing. Called by every process of a launch, with the same arguments.

    Args:
        state: accelerate's `PartialState`.
        folder: opened by the main process.
        prompts: the list.
        settings: the settings of this run for a batch size.
        batch_size: images drawn together; by default as in the folder's first run.
        default_batch_size: what to take in the first run.
        num_images: images per prompt.
        seed: of the first image of prompts without a seed.
        check, draw: see `share`.
        show_progress: a bar on the main process.
        tell: takes notes for the user, on the main process.

    Raises:
        ValueError: if the folder holds images with other settings, or another image by the same name.
        OSError: if the folder cannot be written.
    """
    jobs = make_jobs(prompts, seed=seed, num_images=num_images)

    def begin() -> _Start:
        found = _begin(folder, jobs, settings, batch_size, default_batch_size)
        folder.join()
        return found

    start = from_main(state, begin)
    everywhere(state, folder.join)
    if state.is_main_process:
        for note in start.notes:
            tell(note)
    units = missing_units(make_units(jobs, start.batch_size), start.done)
    with (
        image_bar(lambda: start.there + folder.count(), total=len(jobs), show=show_progress and state.is_main_process),
        state.split_between_processes(units) as mine,
    ):
        own = draw_share(folder, mine, check=check, draw=draw, settings_hash=start.settings_hash)
        shares = _gathered(own)
    failed = _failed(prompts, shares)
    # Nobody leaves before the files are written: a launcher ends all processes when one reports a failure.
    images = from_main(state, lambda: _end(folder, jobs, failed))
    return Outcome(images=images, drawn=sum(share.drawn for share in shares), failures=failed)


def _begin(
    folder: ImageFolder,
    jobs: list[Job],
    settings: Callable[[int], BatchSettings],
    batch_size: int | None,
    default_batch_size: Callable[[], int],
) -> _Start:
    """Compare the folder with what is asked for, and write down the settings of a new one."""
    records = folder.records()
    config = folder.read_config()
    old = None if config is None else BatchSettings.from_dict(config)
    recorded = old.values.get("batch_size") if old is not None and records else None
    size = batch_size or recorded or default_batch_size()
    new = settings(size)
    notes: tuple[str, ...] = ()
    if old is None and any(record["settings"] != new.hash for record in records.values()):
        raise ValueError(
            f"{folder.path} holds images with other settings, and its config.json is missing or damaged: "
            "choose another folder"
        )
    if old is not None and records:
        changed = differences(old.values, new.values)
        if changed:
            raise ValueError(
                f"{folder.path} holds images with other settings ({'; '.join(changed)}): choose another folder, or "
                "the same settings"
            )
        others = differences(old.made_with, new.made_with)
        if others:
            notes = (f"the images that are there were made with {'; '.join(others)}: new ones may differ a little",)
    for job in jobs:
        other = difference(records[job.name], job) if job.name in records else None
        if other is not None:
            raise ValueError(f"{folder.path} holds another image by the name {job.name!r} ({other}): use another id")
    if old is None or not records:
        folder.write_config(new.to_dict())
    names = {job.name for job in jobs}
    done = frozenset(names & set(records))
    return _Start(size, done, len(done) - folder.count(), new.hash, notes)


def _end(folder: ImageFolder, jobs: list[Job], failures: tuple[Failure, ...]) -> int:
    names = [job.name for job in jobs]
    found = folder.finish(names, failures)
    return sum(name in found for name in names)


def _failed(prompts: PromptList, shares: Iterable[Share]) -> tuple[Failure, ...]:
    """Lines that could not be read and images that could not be drawn, in the order of the list."""
    bad = [Failure(line=line.line, id=None, error=line.error) for line in prompts.bad]
    failures = dict.fromkeys([*bad, *(item for share in shares for item in share.failures)])
    return tuple(sorted(failures, key=lambda item: item.line))


def _gathered(share: Share) -> list[Share]:
    """Every process's share, in the order of the ranks."""
    from accelerate.utils import gather_object

    shares: list[Share] = gather_object([share])
    return shares
