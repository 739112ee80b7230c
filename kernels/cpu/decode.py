# SPDX-License-Identifier: Apache-2.0
"""The decode step of one layer: write the new entry of each region, then attend over the region.

Both happen in one loop, region by region, so the new key is still in cache when it is read.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attend import attend
from .jit import SOURCES, jit, worker
from .job import (
    FIRST,
    REGIONS,
    address_of,
    as_float32,
    as_integer,
    element_of,
    longest,
    next_region,
    opened,
    readable,
    run_job,
)
from .memory import cube, float32s, int32s, matrix

# What the job holds, in the order of `_run`.
(_BATCH, _GROUP, _SIZE, _SLOTS, _SCALE, _SOFTCAP, _QUERY, _NEW_KEYS, _NEW_VALUES, _NEW_POSITIONS) = range(
    FIRST, FIRST + 10
)
(_KEYS, _VALUES, _POSITIONS, _START, _LENGTH, _SINKS, _MASS, _OUT) = range(FIRST + 10, FIRST + 18)


@jit
def _append(job: Any, region: int, length: Any, element: Any) -> None:
    """Write the new entry of one region into the slot after its last."""
    size = job[_SIZE]
    regions = job[REGIONS]
    new_keys = matrix(job[_NEW_KEYS], regions, size, element)
    new_values = matrix(job[_NEW_VALUES], regions, size, element)
    keys = matrix(job[_KEYS], job[_SLOTS], size, element)
    values = matrix(job[_VALUES], job[_SLOTS], size, element)
    mass = float32s(job[_MASS], job[_SLOTS])
    slot = int32s(job[_START], regions)[region] + np.int64(length[region])
    for d in range(size):
        keys[slot, d] = new_keys[region, d]
        values[slot, d] = new_values[region, d]
    row = region // (regions // job[_BATCH])
    int32s(job[_POSITIONS], job[_SLOTS])[slot] = int32s(job[_NEW_POSITIONS], job[_BATCH])[row]
    if mass.size > 0:
        mass[slot] = np.float32(0.0)
    length[region] += 1


@jit
def _append_all(address: int, element: Any) -> None:
    job = opened(address)
    length = int32s(job[_LENGTH], job[REGIONS])
    region = next_region(job, length)
    while region >= 0:
        _append(job, region, length, element)
        region = next_region(job, length)


@jit
def _decode(address: int, element: Any) -> None:
    job = opened(address)
    regions, group, size, slots = job[REGIONS], job[_GROUP], job[_SIZE], job[_SLOTS]
    scale, softcap = as_float32(job, _SCALE), as_float32(job, _SOFTCAP)
    query = cube(job[_QUERY], regions, group, size, np.float32(0))
    out = cube(job[_OUT], regions, group, size, np.float32(0))
    keys = matrix(job[_KEYS], slots, size, element)
    values = matrix(job[_VALUES], slots, size, element)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    mass = float32s(job[_MASS], slots)
    sinks = float32s(job[_SINKS], regions // job[_BATCH] * group)  # [H]
    appends = job[_NEW_KEYS] != 0
    # Other threads may have appended to their regions already, or not: one more than the longest holds in any case.
    logits = np.empty((group, longest(length) + 1), np.float32)
    region = next_region(job, length)
    while region >= 0:
        if appends:
            _append(job, region, length, element)
        begin, count = np.int64(start[region]), np.int64(length[region])
        if sinks.size > 0:  # region b * G + g has the query heads g * R .. g * R + R
            head = region * group % sinks.size
            own_sinks = sinks[head : head + group]
        else:
            own_sinks = sinks
        attend(query[region], keys, values, begin, count, scale, softcap, own_sinks, mass, logits, out[region])
        region = next_region(job, length)


@functools.cache
def append_worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def append_all(address: Any) -> None:
        if sources:
            _append_all(address, element(0))

    return worker(append_all)


@functools.cache
def decode_worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def decode(address: Any) -> None:
        if sources:
            _decode(address, element(0))

    return worker(decode)


_NewEntry = tuple[Tensor, Tensor, Tensor]
_Store = tuple[Tensor, Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None"]


def _run(
    compiled: Any,
    query: Tensor | None,
    new: _NewEntry | None,
    store: _Store,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor | None,
) -> None:
    keys, values, positions, start, length, mass = store
    batch, heads = length.shape
    regions, (slots, size), dtype = batch * heads, keys.shape, keys.dtype
    if regions == 0:
        return
    group, entry = 0, [0, 0, 0]
    if new is not None:
        new_keys, new_values, new_positions = (
            readable(new[0], dtype),
            readable(new[1], dtype),
            readable(new[2], torch.int32),
        )
        entry = [
            address_of(new_keys, dtype, regions * size, "new_keys"),
            address_of(new_values, dtype, regions * size, "new_values"),
            address_of(new_positions, torch.int32, batch, "new_positions"),
        ]
    if query is not None:
        group = query.shape[1] // heads
    if sinks is not None:
        sinks = readable(sinks, torch.float32)
    numbers = [
        batch,
        group,
        size,
        slots,
        as_integer(scale),
        as_integer(softcap),
        address_of(query, torch.float32, regions * group * size, "query"),
        *entry,
        address_of(keys, dtype, slots * size, "keys"),
        address_of(values, dtype, slots * size, "values"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(sinks, torch.float32, heads * group, "sinks"),
        address_of(mass, torch.float32, slots, "mass"),
        address_of(out, torch.float32, regions * group * size, "out"),
    ]
    run_job(compiled, numbers, regions, slots, regions * size if out is None else slots * size)


def _attend(
    query: Tensor, new: _NewEntry | None, store: _Store, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    single = readable(query, torch.float32)
    out = torch.empty_like(single)
    _run(decode_worker_for(store[0].dtype), single, new, store, scale, softcap, sinks, out)
    return out if query.dtype == torch.float32 else out.to(query.dtype)


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
    store = (keys, values, positions, start, length, mass)
    _run(append_worker_for(keys.dtype), None, (new_keys, new_values, new_positions), store, 0.0, 0.0, None, None)


def ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per row over its regions, [B, H, D]. See `reference.ragged_decode`."""
    del max_length
    return _attend(query, None, (keys, values, None, start, length, mass), scale, softcap, sinks)


def append_decode(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """`slot_write` and `ragged_decode` in one pass, [B, H, D]. See `reference.append_decode`."""
    del max_length
    new = (new_keys, new_values, new_positions)
    return _attend(query, new, (keys, values, positions, start, length, mass), scale, softcap, sinks)
