# SPDX-License-Identifier: Apache-2.0
"""Writing the new entry of each region into the slot after its last."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import SOURCES, jit, worker
from .job import FIRST, REGIONS, address_of, element_of, next_region, opened, readable, run_job
from .memory import float32s, int32s, matrix

(_BATCH, _SIZE, _SLOTS, _NEW_KEYS, _NEW_VALUES, _NEW_POSITIONS) = range(FIRST, FIRST + 6)
(_KEYS, _VALUES, _POSITIONS, _START, _LENGTH, _MASS) = range(FIRST + 6, FIRST + 12)


@jit
def write_entry(
    new_key: Any, new_value: Any, new_position: Any, keys: Any, values: Any, positions: Any, mass: Any, slot: Any
) -> None:
    """Write one entry, [D] each, into a slot; its mass, where there is one, starts at zero."""
    for d in range(new_key.size):
        keys[slot, d] = new_key[d]
        values[slot, d] = new_value[d]
    positions[slot] = new_position
    if mass.size > 0:
        mass[slot] = np.float32(0.0)


@jit
def _write_all(address: int, element: Any) -> None:
    job = opened(address)
    batch, size, slots, regions = job[_BATCH], job[_SIZE], job[_SLOTS], job[REGIONS]
    new_keys = matrix(job[_NEW_KEYS], regions, size, element)
    new_values = matrix(job[_NEW_VALUES], regions, size, element)
    new_positions = int32s(job[_NEW_POSITIONS], batch)
    keys, values = matrix(job[_KEYS], slots, size, element), matrix(job[_VALUES], slots, size, element)
    positions, mass = int32s(job[_POSITIONS], slots), float32s(job[_MASS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    region = next_region(job, length)
    while region >= 0:
        slot, position = np.int64(start[region]) + np.int64(length[region]), new_positions[region // (regions // batch)]
        write_entry(new_keys[region], new_values[region], position, keys, values, positions, mass, slot)
        length[region] += 1
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def write_all(address: Any) -> None:
        if sources:
            _write_all(address, element(0))

    return worker(write_all)


def slot_write(
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Append one entry to every region, in place. See `reference.slot_write`."""
    batch, (slots, size), regions, dtype = length.shape[0], keys.shape, length.numel(), keys.dtype
    if regions == 0:
        return
    new_keys, new_values = readable(new_keys, dtype), readable(new_values, dtype)
    new_positions = readable(new_positions, torch.int32)
    numbers = [
        batch,
        size,
        slots,
        address_of(new_keys, dtype, regions * size, "new_keys"),
        address_of(new_values, dtype, regions * size, "new_values"),
        address_of(new_positions, torch.int32, batch, "new_positions"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(values, dtype, slots * size, "values"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(mass, torch.float32, slots, "mass"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, regions * size)
