# SPDX-License-Identifier: Apache-2.0
"""Drawing without a model, ranks without a launcher, and a process that dies at a given step."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headkv_mm.batch import files
from headkv_mm.batch.folder import TIMINGS, ImageFolder
from headkv_mm.batch.jobs import Job, make_jobs, make_units, missing_units
from headkv_mm.batch.prompts import PromptList, parse_prompts
from headkv_mm.batch.records import Drawn
from headkv_mm.batch.run import _begin, _end, _failed
from headkv_mm.batch.settings import BatchSettings
from headkv_mm.batch.share import Share, draw_share

DEATH = 9


def settings(batch_size: int) -> BatchSettings:
    return BatchSettings({"batch_size": batch_size, "budget": 0.25}, {"versions": {"torch": "1"}})


def text_list(count: int) -> PromptList:
    lines = "\n".join(f"picture {number}" for number in range(count))
    return parse_prompts(lines.encode(), objects=False, source="list.txt")


def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
    """Bytes that depend on the whole batch, as rounding does."""
    batch = " ".join(f"{job.name}:{job.seed}" for job in jobs)
    images = [Drawn(job, hashlib.sha512(f"{job.name} of {batch}".encode()).digest() * 4) for job in jobs]
    return images, {"seconds": random.random()}


def check(job: Job) -> None:
    """Any prompt will do."""


def run(
    path: Path,
    prompts: PromptList,
    *,
    ranks: int = 1,
    batch_size: int | None = None,
    order: int = 0,
    draw: Callable[[Sequence[Job]], tuple[list[Drawn], dict[str, Any]]] = draw,
    check: Callable[[Job], None] = check,
    settings: Callable[[int], BatchSettings] = settings,
) -> list[Share]:
    """What `draw_folder` does on so many ranks, their batches in a random order, one after the other."""
    folders = [ImageFolder(path) for _ in range(ranks)]
    try:
        folders[0].open()
        jobs = make_jobs(prompts, seed=0, num_images=1)
        start = _begin(folders[0], jobs, settings, batch_size, lambda: 2)
        for folder in folders:
            folder.join()
        units = missing_units(make_units(jobs, start.batch_size), start.done)
        turns = [(index % ranks, unit) for index, unit in enumerate(units)]
        random.Random(order).shuffle(turns)
        shares = [
            draw_share(folders[rank], [unit], check=check, draw=draw, settings_hash=start.settings_hash)
            for rank, unit in turns
        ]
        _end(folders[0], jobs, _failed(prompts, shares))
        return shares
    finally:
        for folder in folders:
            folder.abandon()


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder but the timings, which differ from run to run."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != TIMINGS
    }


STEPS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")


def count_steps(work: Callable[[], object]) -> int:
    """Run `work` in a child; returns how many steps it took that change the disk."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        taken = _watch(lambda number, cut: None)
        work()
        os.write(writer, str(len(taken)).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status == 0
    with os.fdopen(reader) as pipe:
        return int(pipe.read())


def die_at(step: int, work: Callable[[], object], *, before: bool) -> bool:
    """Run `work` in a child that is gone before or after its step of this number; returns whether it got there."""
    child = os.fork()
    if child == 0:

        def stop(number: int, cut: Callable[[], None] | None) -> None:
            if number == step:
                if cut is not None:
                    cut()
                os._exit(DEATH)

        _watch(stop, before=before)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, DEATH), code
    return code == DEATH


def _watch(stop: Callable[[int, Callable[[], None] | None], None], *, before: bool = True) -> list[str]:
    """Call `stop` around every step from now on. A file that dies before its fsync is cut in half."""
    taken: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            number = len(taken)
            taken.append(name)
            if before:
                half = (lambda: os.truncate(args[0], os.fstat(args[0]).st_size // 2)) if name == "fsync" else None
                stop(number, half)
                return real(*args, **kwargs)
            try:
                return real(*args, **kwargs)
            finally:
                stop(number, None)

        return step

    for name in STEPS:
        setattr(os, name, watched(name))
    assert files.os is os
    return taken
