# SPDX-License-Identifier: Apache-2.0
"""A run may die at every single step; the next one goes on, and the folder ends up the same to the last byte."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import batch_support as support
import pytest

from headkv_mm.batch.files import read_lines
from headkv_mm.batch.jobs import Job
from headkv_mm.batch.records import Drawn

PROMPTS = support.text_list(5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    support.run(folder, PROMPTS)
    found = support.contents(folder)
    assert set(found) == {"config.json", "manifest.jsonl", *(f"{number:05d}.png" for number in range(1, 6))}
    return found


def committed(path: Path) -> set[str]:
    """Names of the images in finished batches and in the manifest."""
    records = read_lines(path / "manifest.jsonl")
    for batch in path.glob(".headkv-mm/done/*"):
        records += read_lines(batch / "records.jsonl")
    return {record["file"].removesuffix(".png") for record in records}


def resume(path: Path, ranks: int) -> None:
    """Go on, and draw nothing that was finished."""
    finished = committed(path)
    drawn: list[str] = []

    def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
        drawn.extend(job.name for job in jobs)
        return support.draw(jobs)

    support.run(path, PROMPTS, ranks=ranks, draw=draw)
    assert not finished & set(drawn)
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_death_at_every_step(tmp_path: Path, undisturbed: dict[str, bytes], before: bool, ranks: int) -> None:
    steps = support.count_steps(lambda: support.run(tmp_path / "counted", PROMPTS, ranks=ranks, order=1))
    assert steps > 40
    for step in range(steps):
        path = tmp_path / f"{step}"
        assert support.die_at(step, partial(support.run, path, PROMPTS, ranks=ranks, order=1), before=before)
        resume(path, ranks=1 + step % 3)
        assert support.contents(path) == undisturbed, f"step {step} of {steps}"
        assert not list(path.glob(".*")), "no working files stay behind"


def test_several_deaths_in_a_row(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    dice = random.Random(0)
    for trial in range(10):
        path = tmp_path / str(trial)
        while support.die_at(
            dice.randrange(40),
            partial(support.run, path, PROMPTS, ranks=dice.choice((1, 2, 3)), order=trial),
            before=dice.random() < 0.5,
        ):
            assert committed(path) <= {f"{number:05d}" for number in range(1, 6)}
        assert support.contents(path) == undisturbed


def test_timings_are_kept_through_a_death(tmp_path: Path) -> None:
    steps = support.count_steps(lambda: support.run(tmp_path / "counted", PROMPTS))
    support.die_at(steps // 2, lambda: support.run(tmp_path / "out", PROMPTS), before=True)
    support.run(tmp_path / "out", PROMPTS)
    timings = read_lines(tmp_path / "out" / "timings.jsonl")
    assert sorted(name for timing in timings for name in timing["images"]) == [f"{i:05d}" for i in range(1, 6)]
    assert all(0 <= timing["seconds"] < 1 for timing in timings)
