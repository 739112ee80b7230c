# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels on several threads: OpenMP inside a call, Python threads around it, and both."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from headkv_mm.kernels import cpu, reference
from headkv_mm.kernels.cpu import threads
from headkv_mm.kernels.cpu.parts import PART
from headkv_mm.kernels.mass_kinds import MassOf

from .triton_cases import Storage, close, storage
from .triton_checks import CHECKS, decode_case

# One region longer than all others together, so that the threads share it, and one that grows into a second part.
LENGTHS = [[1900, 3, 0, 40], [20, 500, 31, 1]]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def steps(s: Storage, count: int) -> list[Tensor]:
    """Outputs of some decode steps, as a decoding thread makes them."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for step in range(count):
        new = torch.randn(2, 2, 4, 64, generator=generator)
        query, positions = torch.randn(2, 8, 64, generator=generator), torch.tensor([step, step]).int()
        mass_of: MassOf = "squared_logits" if step % 2 else "attention"
        into: dict[str, Any] = {"mass": s.mass, "mass_of": mass_of}
        outputs.append(cpu.append_decode(query, *new, positions, *s.tensors(), scale=0.1, **into))
    return outputs


def big_storage(count: int) -> Storage:
    return storage(LENGTHS, 64, torch.float32, "cpu", slack=count)


def test_job_is_big_enough_for_two_threads() -> None:
    assert threads.thread_count(big_storage(3).keys.numel()) == 2
    assert threads.thread_count(100) == 1


@pytest.mark.parametrize("fork", [threads.torch_fork, threads.numba_fork])
def test_threads_compute_what_one_computes(fork: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: a region is cut at the same slots on any number of threads. Both ways to fork must exist here."""
    alone = big_storage(20)
    torch.set_num_threads(1)
    expected = steps(alone, 20)
    torch.set_num_threads(2)
    forks = fork()  # type: ignore[operator]
    if forks is None:
        pytest.skip("no such threads in this installation")
    used: list[int] = []

    def spy(worker: object, job: int, count: int) -> None:
        used.append(count)
        forks(worker, job, count)

    monkeypatch.setattr(threads, "_fork", lambda: spy)
    shared = big_storage(20)
    for got, want in zip(steps(shared, 20), expected):
        assert torch.equal(got, want)
    assert used == [2] * 20
    torch.testing.assert_close(shared.mass, alone.mass, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_single_long_region_is_shared(dtype: torch.dtype) -> None:
    """Parts, merged, against the float64 reference, with every option; lengths around whole parts."""
    for n in (PART - 1, PART, PART + 1, 2 * PART + 1, 5 * PART + 7):
        s = storage([[n]], 64, dtype, "cpu", slack=4)
        assert threads.thread_count(s.keys.numel()) == 2 or n < 2 * PART
        for append in (True, False):
            decode_case(cpu, s, 3, append=append, softcap=3.0, sinks=True, mass=True)
        decode_case(cpu, s, 1, append=True)


def test_nan_in_a_part_is_not_hidden() -> None:
    """Also where no logit of the part is a number: the maximum over them is then -inf."""
    s = storage([[3 * PART]], 16, torch.float32, "cpu")
    begin = int(s.start)
    s.keys[begin : begin + PART] = float("nan")
    out = cpu.ragged_decode(s.normal(1, 1, 16), s.keys, s.values, s.start, s.length, scale=0.25)
    assert out.isnan().all()


def test_logits_of_minus_infinity_in_one_part() -> None:
    s = storage([[3 * PART]], 16, torch.float32, "cpu")
    begin, query = int(s.start), torch.ones(1, 1, 16)
    s.keys[begin + PART : begin + 3 * PART, 0] = float("-inf")
    out = cpu.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.25)
    close(out, reference.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.25), 1e-5)


def test_regions_that_overlap_stay_inside_their_scratch() -> None:
    """A contract broken: more slots in the lengths than there are. Reading alone is defined, and must be right."""
    s = storage([[4 * PART]], 16, torch.float32, "cpu")
    start, length = s.start.expand(9, 1).contiguous(), s.length.expand(9, 1).contiguous()
    query = s.normal(9, 1, 16)
    out = cpu.ragged_decode(query, s.keys, s.values, start, length, scale=0.25)
    close(out, reference.ragged_decode(query, s.keys, s.values, start, length, scale=0.25), 1e-5)


def test_every_kernel_on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SMALL", 0)
    for check in CHECKS.values():
        check(cpu, "cpu", torch.float32)


def test_without_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_fork", lambda: None)
    assert steps(big_storage(2), 2)[1].isfinite().all()


DECODE_AT_ONCE = """
import threading, torch
from headkv_mm.kernels import cpu
torch.set_num_threads(2)
def decode(seed):
    keys = torch.randn(4000, 64, generator=torch.Generator().manual_seed(seed))
    start, length = torch.arange(0, 4000, 500).view(2, 4).int(), torch.full((2, 4), 480).int()
    query = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed))
    arguments = (query, keys, keys, start, length)
    torch.set_num_threads(2)
    first = cpu.ragged_decode(*arguments, scale=0.1)
    for _ in range(200):
        same[seed] &= torch.equal(cpu.ragged_decode(*arguments, scale=0.1), first)
    expected[seed] = (arguments, first)
same, expected = {0: True, 1: True, 2: True}, {}
running = [threading.Thread(target=decode, args=(seed,)) for seed in same]
for thread in running: thread.start()
for thread in running: thread.join()
torch.set_num_threads(1)
for arguments, first in expected.values():
    assert torch.equal(cpu.ragged_decode(*arguments, scale=0.1), first)
assert same == {0: True, 1: True, 2: True} and len(expected) == 3
print("all the same")
"""


@pytest.mark.parametrize("pool", ["torch", "numba"])
def test_python_threads_decode_at_once(pool: str) -> None:
    """In a process of its own, because the failure would be an abort."""
    script = DECODE_AT_ONCE
    if pool == "numba":
        script = "from headkv_mm.kernels.cpu import threads\nthreads._fork = threads.numba_fork\n" + script
        script = script.replace("numba_fork\n", "numba_fork()\nfork = threads._fork\nthreads._fork = lambda: fork\n", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all the same"


def test_python_threads_share_the_interpreter() -> None:
    """A call lets other Python threads run: the lock is free while the loops do."""
    s = storage([[60000]], 64, torch.float32, "cpu")
    query, done, ticks = s.normal(1, 1, 64), threading.Event(), 0

    def decode() -> None:
        for _ in range(20):
            cpu.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.1)
        done.set()

    thread = threading.Thread(target=decode)
    thread.start()
    while not done.wait(0.0005):
        ticks += 1
    thread.join()
    assert ticks >= 3
