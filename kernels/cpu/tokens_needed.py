# SPDX-License-Identifier: Apache-2.0
"""How many of the newest entries hold a share of each region's mass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import SOURCES, exact_jit, worker
from .job import FIRST, REGIONS, address_of, as_float32, as_integer, next_region, opened, readable, run_job
from .memory import float32s, int32s

(_SLOTS, _TAU, _MASS, _POSITIONS, _START, _LENGTH, _NEEDED) = range(FIRST, FIRST + 7)

_SORTING = 16
"""Reads per entry that a sort is worth, for the choice of threads."""


@exact_jit
def _needed(mass: Any, newest_first: Any, tau: Any) -> Any:
    """Entries until the running sum reaches tau * total; 0 without mass.

    Sums run in float64 and are compared in float32, as torch's cumsum does, so that the count is the reference's.
    """
    total = 0.0
    for j in newest_first:
        total += mass[j]
    if not total > 0:
        return 0
    target = tau * np.float32(total)
    below, accumulated = 0, 0.0
    for j in newest_first:
        accumulated += mass[j]
        if np.float32(accumulated) < target:
            below += 1
    return min(below + 1, newest_first.size)


@exact_jit
def _tokens_needed(address: int) -> None:
    job = opened(address)
    regions, slots, tau = job[REGIONS], job[_SLOTS], as_float32(job, _TAU)
    mass, positions = float32s(job[_MASS], slots), int32s(job[_POSITIONS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    needed = int32s(job[_NEEDED], regions)
    region = next_region(job, length)
    while region >= 0:
        begin = np.int64(start[region])
        end = begin + np.int64(length[region])
        newest_first = np.argsort(-positions[begin:end].astype(np.int64))
        needed[region] = _needed(mass[begin:end], newest_first, tau)
        region = next_region(job, length)


@functools.cache
def the_worker() -> Any:
    """The compiled loop."""
    sources = SOURCES

    def tokens_needed(address: Any) -> None:
        if sources:
            _tokens_needed(address)

    return worker(tokens_needed)


def tokens_needed(mass: Tensor, positions: Tensor, start: Tensor, length: Tensor, *, tau: float) -> Tensor:
    """How many of the newest entries hold a share `tau` of the mass, [B, G] int32. See `reference.tokens_needed`."""
    regions, slots = start.numel(), positions.numel()
    mass = readable(mass, torch.float32)
    needed = torch.empty(start.shape, dtype=torch.int32)
    numbers = [
        slots,
        as_integer(tau),
        address_of(mass, torch.float32, slots, "mass"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(needed, torch.int32, regions, "needed"),
    ]
    run_job(the_worker(), numbers, regions, slots, slots * _SORTING)
    return needed
