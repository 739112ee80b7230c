# SPDX-License-Identifier: Apache-2.0
"""Copy kept entries into new regions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import SOURCES, jit, worker
from .job import FIRST, REGIONS, address_of, element_of, next_region, opened, readable, run_job
from .memory import float32s, int32s, matrix, vector

(_SIZE, _SLOTS, _NEW_SLOTS, _KEEP, _KEYS, _VALUES, _POSITIONS, _START, _LENGTH) = range(FIRST, FIRST + 9)
(_NEW_KEYS, _NEW_VALUES, _NEW_POSITIONS, _NEW_START, _NEW_LENGTH, _MASS, _NEW_MASS) = range(FIRST + 9, FIRST + 16)


@jit
def _gather_regions(address: int, element: Any) -> None:
    job = opened(address)
    regions, size, slots, new_slots = job[REGIONS], job[_SIZE], job[_SLOTS], job[_NEW_SLOTS]
    keep = vector(job[_KEEP], slots, np.uint8(0))
    keys, values = matrix(job[_KEYS], slots, size, element), matrix(job[_VALUES], slots, size, element)
    new_keys = matrix(job[_NEW_KEYS], new_slots, size, element)
    new_values = matrix(job[_NEW_VALUES], new_slots, size, element)
    positions, new_positions = int32s(job[_POSITIONS], slots), int32s(job[_NEW_POSITIONS], new_slots)
    mass, new_mass = float32s(job[_MASS], slots), float32s(job[_NEW_MASS], new_slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    new_start, new_length = int32s(job[_NEW_START], regions), int32s(job[_NEW_LENGTH], regions)
    region = next_region(job, length)
    while region >= 0:
        begin, target = np.int64(start[region]), np.int64(new_start[region])
        for slot in range(begin, begin + np.int64(length[region])):
            if keep.size == 0 or keep[slot] != 0:
                for d in range(size):
                    new_keys[target, d] = keys[slot, d]
                    new_values[target, d] = values[slot, d]
                new_positions[target] = positions[slot]
                if new_mass.size > 0:
                    new_mass[target] = mass[slot]
                target += 1
        new_length[region] = target - new_start[region]
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def gather_regions(address: Any) -> None:
        if sources:
            _gather_regions(address, element(0))

    return worker(gather_regions)


def gather_regions(
    rows: Tensor,
    keep: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    new_start: Tensor,
    new_length: Tensor,
    mass: Tensor | None = None,
    new_mass: Tensor | None = None,
) -> None:
    """Copy kept entries into new regions. See `reference.gather_regions`."""
    (slots, size), dtype, new_slots = keys.shape, keys.dtype, new_keys.shape[0]
    # Where each new region comes from, [B', G]. Copies, so that `new_length` may be `length` itself.
    old_start, old_length = start[rows], length[rows]
    regions = old_start.numel()
    keep = None if keep is None else readable(keep, torch.bool)
    if mass is None or new_mass is None:
        mass = new_mass = None
    numbers = [
        size,
        slots,
        new_slots,
        address_of(keep, torch.bool, slots, "keep"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(values, dtype, slots * size, "values"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(old_start, torch.int32, regions, "start"),
        address_of(old_length, torch.int32, regions, "length"),
        address_of(new_keys, dtype, new_slots * size, "new_keys"),
        address_of(new_values, dtype, new_slots * size, "new_values"),
        address_of(new_positions, torch.int32, new_slots, "new_positions"),
        address_of(new_start, torch.int32, regions, "new_start"),
        address_of(new_length, torch.int32, regions, "new_length"),
        address_of(mass, torch.float32, slots, "mass"),
        address_of(new_mass, torch.float32, new_slots, "new_mass"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size)
