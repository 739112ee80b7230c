# SPDX-License-Identifier: Apache-2.0
"""Close the holes that an eviction leaves, moving as few entries as possible."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import SOURCES, jit, worker
from .job import FIRST, REGIONS, address_of, element_of, next_region, opened, readable, run_job
from .memory import float32s, int32s, matrix, vector

(_SIZE, _SLOTS, _VICTIMS, _KEYS, _VALUES, _POSITIONS, _START, _LENGTH, _NEW_LENGTH, _MASS) = range(FIRST, FIRST + 10)


@jit
def _fill_holes(address: int, element: Any) -> None:
    job = opened(address)
    regions, size, slots = job[REGIONS], job[_SIZE], job[_SLOTS]
    victims = vector(job[_VICTIMS], slots, np.uint8(0))
    keys = matrix(job[_KEYS], slots, size, element)
    values = matrix(job[_VALUES], slots, size, element)
    positions, mass = int32s(job[_POSITIONS], slots), float32s(job[_MASS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    new_length = int32s(job[_NEW_LENGTH], regions)
    region = next_region(job, length)
    while region >= 0:
        begin = np.int64(start[region])
        end = begin + np.int64(length[region])
        middle = begin
        for slot in range(begin, end):
            middle += victims[slot] == 0
        # Holes before the middle and survivors after it are as many: both are the survivors that are not in place.
        survivor = middle
        for slot in range(begin, middle):
            if victims[slot] != 0:
                while victims[survivor] != 0:
                    survivor += 1
                for d in range(size):
                    keys[slot, d] = keys[survivor, d]
                    values[slot, d] = values[survivor, d]
                positions[slot] = positions[survivor]
                if mass.size > 0:
                    mass[slot] = mass[survivor]
                survivor += 1
        for slot in range(middle, end):
            positions[slot] = -1
        new_length[region] = middle - begin
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def fill_holes(address: Any) -> None:
        if sources:
            _fill_holes(address, element(0))

    return worker(fill_holes)


def fill_holes(
    victims: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Remove the victims and keep every region packed, in place. See `reference.fill_holes`."""
    regions, (slots, size), dtype = start.numel(), keys.shape, keys.dtype
    victims = readable(victims, torch.bool)
    old_length = length.clone()  # threads share the regions out by it, while `length` changes
    numbers = [
        size,
        slots,
        address_of(victims, torch.bool, slots, "victims"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(values, dtype, slots * size, "values"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(old_length, torch.int32, regions, "length"),
        address_of(length, torch.int32, regions, "length"),
        address_of(mass, torch.float32, slots, "mass"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size)
