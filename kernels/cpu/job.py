# SPDX-License-Identifier: Apache-2.0
"""The block of numbers that a kernel call passes to its workers, and how they share out the regions.

A job is an int64 array. Three numbers for `next_region` come first, the kernel's own follow: sizes, addresses of
tensors (0 for one that was not given), and floats as the bits of a float64.
"""

from __future__ import annotations

import array
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import exact_jit, jit
from .memory import fetch_and_add_one, vector
from .threads import run, thread_count

COUNTER, REGIONS, LONG = 0, 1, 2
FIRST = 3
"""Where the kernel's own numbers start."""

_ELEMENTS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}

_FLOAT, _INTEGER = struct.Struct("=d"), struct.Struct("=q")


def element_of(dtype: torch.dtype) -> Any:
    """The numpy type in which a worker sees elements of a dtype; `bits.widen` knows what the integers mean.

    Raises:
        TypeError: the kernels here have no code for the dtype.
    """
    if dtype not in _ELEMENTS:
        raise TypeError(f"the numba kernels take float32, float16 or bfloat16, got {dtype}: use kernels.reference")
    return _ELEMENTS[dtype]


def address_of(tensor: Tensor | None, dtype: torch.dtype, count: int, name: str) -> int:
    """Address of a tensor's first element, 0 for None.

    Raises:
        TypeError: another dtype.
        ValueError: not on the CPU, not contiguous, or not `count` elements: the kernel would touch foreign memory.
    """
    if tensor is None:
        return 0
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}: convert it with {name}.to({dtype})")
    if tensor.numel() != count or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be contiguous, on the CPU and hold {count} elements, got shape {tuple(tensor.shape)} with "
            f"strides {tensor.stride()} on {tensor.device}: pass {name}.contiguous() of the right shape"
        )
    return tensor.data_ptr()


def readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, or a contiguous copy in `dtype`. Keep it alive until the kernel has run."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def as_integer(number: float) -> int:
    """A float as the int64 with the bits of its float64; `as_float32` reads it."""
    bits: int = _INTEGER.unpack(_FLOAT.pack(number))[0]
    return bits


def run_job(
    worker: Any, numbers: list[int], regions: int, slots: int, elements: int, prepare: Any | None = None
) -> None:
    """Run a worker over `regions` regions that lie in `slots` slots; the job reads about `elements` elements.

    `prepare`, also a worker, comes before several threads start and may write into the job.
    """
    # Regions longer than the mean capacity are taken first (see `next_region`).
    if regions > 0:
        job = array.array("q", [0, regions, slots // regions, *numbers])
        address = job.buffer_info()[0]
        threads = thread_count(elements)
        if prepare is not None and threads > 1:
            prepare.ctypes(address)
        run(worker, address, threads)


@jit
def opened(address: int) -> Any:
    """The job at an address."""
    return vector(address, 64, np.int64(0))


@exact_jit
def as_float32(job: Any, index: int) -> Any:
    """A float of the job, that `as_integer` made a number of."""
    return np.float32(job[index : index + 1].view(np.float64)[0])


@jit
def next_ticket(job: Any, tickets: Any) -> Any:
    """The next number below `tickets` for this thread, -1 when there is none left."""
    ticket = fetch_and_add_one(job)
    return ticket if ticket < tickets else np.int64(-1)


@jit
def next_region(job: Any, length: Any) -> Any:
    """The next region for this thread, -1 when there is none left.

    There are two rounds of tickets, first for the long regions and then for the others, so that no thread starts a long
    one last. The lengths may grow meanwhile, as in a decode step: only regions that the first round has taken are
    looked at again, and they stay long. They may not shrink.
    """
    while True:
        ticket = fetch_and_add_one(job)
        if ticket >= 2 * job[REGIONS]:
            return -1
        is_first_round = ticket < job[REGIONS]
        region = ticket if is_first_round else ticket - job[REGIONS]
        if (length[region] > job[LONG]) == is_first_round:
            return region


@jit
def longest(length: Any) -> Any:
    """The largest of the lengths, 0 if there are none."""
    most = np.int64(0)
    for i in range(length.size):
        most = max(most, np.int64(length[i]))
    return most
