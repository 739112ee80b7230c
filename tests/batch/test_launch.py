# SPDX-License-Identifier: Apache-2.0
"""Real processes of torchrun, killed with SIGKILL in the middle of their work, and resumed.

Two kills by default; `HEADKV_MM_KILLS=20 pytest tests/batch/test_launch.py` is the long variant.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import batch_support as support
import pytest

from headkv_mm.batch.files import read_lines

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("HEADKV_MM_KILLS", "2"))
IMAGES = 24
FOREVER = 600  # seconds


@pytest.fixture
def command(small_image_model: str, tmp_path: Path) -> list[str]:
    """The arguments of a run, without the output folder."""
    words = ("red circle top", "blue ring left on black", "green cross bottom", "a zebra")
    (tmp_path / "list.txt").write_text("\n".join(words[number % len(words)] for number in range(IMAGES)))
    options = ["--kv-budget", "1/2", "--kv-option", "grouping_rows=2", "--batch-size", "2", "--device", "cpu"]
    return [str(tmp_path / "list.txt"), "--model", small_image_model, *options]


def start(command: list[str], output: Path, processes: int) -> subprocess.Popen[bytes]:
    """Start the script."""
    launcher = [sys.executable]
    if processes > 1:
        # A free port, so that two runs of the tests do not meet.
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEADKV_MM_KERNELS": "reference"}
    return subprocess.Popen(
        [*launcher, str(ROOT / "scripts" / "generate_images.py"), *command, "--output", str(output)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finished(output: Path) -> set[str]:
    """Images that no later run may draw again."""
    records = read_lines(output / "manifest.jsonl")
    for batch in output.glob(".headkv-mm/done/*/records.jsonl"):
        records += read_lines(batch)
    return {record["file"] for record in records}


def workers(launcher: int) -> Iterator[int]:
    """The processes that a launcher has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == launcher:
            yield int(folder.name)


def kill_in_the_middle(process: subprocess.Popen[bytes], output: Path, dice: random.Random, *, one: bool) -> bool:
    """Kill all, or one worker, some time after the run has finished its first images; returns whether it was alive."""
    before, more = len(finished(output)), dice.randint(1, 4)
    deadline = time.monotonic() + FOREVER
    while process.poll() is None and len(finished(output)) < before + more and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(dice.random() * 0.2)
    alive = process.poll() is None
    running = sorted(workers(process.pid))
    for worker in [dice.choice(running)] if one and running else [process.pid, *running]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    process.wait(FOREVER)  # if one was killed, the launcher ends the others
    return alive


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_processes_lose_nothing(command: list[str], tmp_path: Path) -> None:
    dice = random.Random(KILLS)
    undisturbed = tmp_path / "undisturbed"
    assert start(command, undisturbed, 1).wait(FOREVER) == 1, "zebras cannot be drawn"
    wanted = support.contents(undisturbed)
    assert sum(name.endswith(".png") for name in wanted) == IMAGES * 3 // 4
    done = folder = 0
    while done < KILLS:
        folder += 1
        output = tmp_path / f"killed{folder}"
        for _ in range(min(4, KILLS - done)):  # more would leave nothing to draw
            was = finished(output)
            process = start(command, output, 2)
            alive = kill_in_the_middle(process, output, dice, one=done % 2 == 1)
            assert was <= finished(output)
            done += alive
        process = start(command, output, dice.choice((1, 2, 3)) if KILLS > 2 else 1)
        assert process.wait(FOREVER) == 1
        assert support.contents(output) == wanted
        assert not list(output.glob(".*"))
        timings = [name for timing in read_lines(output / "timings.jsonl") for name in timing["images"]]
        assert sorted(timings) == sorted(set(timings)), "an image was drawn again after it was finished"
        assert len(timings) == IMAGES * 3 // 4
        print(f"{done} kills in {folder} folders", flush=True)
