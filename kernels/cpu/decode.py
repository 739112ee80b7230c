# SPDX-License-Identifier: Apache-2.0
"""The decode step of one layer: write the new entry of each region, then attend over the region.

Both happen in one loop, so the new key is still in cache when it is read. Long regions are cut into parts (`parts.py`);
the thread that finishes the last part of a region merges them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mass_kinds import MassOf, adds_squares
from .attend import add_mass, attend_part, merge_parts, weights_of_part
from .jit import SOURCES, jit, worker
from .job import (
    FIRST,
    REGIONS,
    address_of,
    as_float32,
    as_integer,
    element_of,
    next_ticket,
    opened,
    readable,
    run_job,
)
from .memory import cube, fetch_and_add_one, float32s, int32s, matrix, vector
from .parts import BEGIN, COLUMNS, COUNT, FIRST_TASK, PARTS, REGION, lay_out, most_tasks, scratch
from .slot_write import write_entry

# What the job holds, in the order of `_run`.
(_BATCH, _GROUP, _SIZE, _SLOTS, _SCALE, _SOFTCAP, _QUERY, _NEW_KEYS, _NEW_VALUES, _NEW_POSITIONS) = range(
    FIRST, FIRST + 10
)
(_KEYS, _VALUES, _POSITIONS, _START, _LENGTH, _SINKS, _MASS, _SQUARES, _OUT) = range(FIRST + 10, FIRST + 19)
# Then its table of tasks, how many parts of each region are done, what they leave, and what `_plan` finds out.
(_MOST_TASKS, _TABLE, _DONE, _PARTIAL, _WEIGHTS, _TASKS, _LARGEST) = range(FIRST + 19, FIRST + 26)


@jit
def _plan(job: Any) -> None:
    """Count the new entries in, and lay out the tasks: lengths do not change while threads run."""
    regions = job[REGIONS]
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    if job[_NEW_KEYS] != 0:
        for region in range(regions):
            length[region] += 1
    vector(job[_DONE], regions, np.int64(0))[:] = 0
    job[_TASKS], job[_LARGEST] = lay_out(start, length, matrix(job[_TABLE], job[_MOST_TASKS], COLUMNS, np.int64(0)))


@jit
def _decode(address: int, element: Any) -> None:
    job = opened(address)
    if job[_TASKS] == 0:  # one thread alone was not told to plan first
        _plan(job)
    regions, group, size, slots, most = job[REGIONS], job[_GROUP], job[_SIZE], job[_SLOTS], job[_MOST_TASKS]
    heads = regions // job[_BATCH]
    scale, softcap = as_float32(job, _SCALE), as_float32(job, _SOFTCAP)
    query = cube(job[_QUERY], regions, group, size, np.float32(0))
    out = cube(job[_OUT], regions, group, size, np.float32(0))
    keys, values = matrix(job[_KEYS], slots, size, element), matrix(job[_VALUES], slots, size, element)
    start, length, mass = int32s(job[_START], regions), int32s(job[_LENGTH], regions), float32s(job[_MASS], slots)
    sinks = float32s(job[_SINKS], heads * group)
    appends = job[_NEW_KEYS] != 0
    new_keys = matrix(job[_NEW_KEYS], regions, size, element)
    new_values = matrix(job[_NEW_VALUES], regions, size, element)
    new_positions, positions = int32s(job[_NEW_POSITIONS], job[_BATCH]), int32s(job[_POSITIONS], slots)
    table, done = matrix(job[_TABLE], most, COLUMNS, np.int64(0)), vector(job[_DONE], regions, np.int64(0))
    partial = cube(job[_PARTIAL], most, group, size, np.float32(0))
    behind, floats = job[_PARTIAL] + 4 * most * group * size, 4 * most * group  # bytes
    peaks, totals = matrix(behind, most, group, np.float32(0)), matrix(behind + floats, most, group, np.float32(0))
    weights = float32s(job[_WEIGHTS], slots * group)
    logits = np.empty((group, job[_LARGEST]), np.float32)
    squares, nothing = job[_SQUARES] != 0, mass[:0]
    ticket = next_ticket(job, job[_TASKS])
    while ticket >= 0:
        region, begin, count = table[ticket, REGION], table[ticket, BEGIN], table[ticket, COUNT]
        end, parts = begin + count, table[ticket, PARTS]
        if appends and end == np.int64(start[region]) + np.int64(length[region]):
            position, last = new_positions[region // heads], end - 1
            write_entry(new_keys[region], new_values[region], position, keys, values, positions, mass, last)
        if count == 0:
            out[region] = np.float32(0.0)
        else:
            own_sinks = sinks
            if sinks.size > 0:
                own_sinks = sinks[region % heads * group : (region % heads + 1) * group]
            first, shared = table[ticket, FIRST_TASK], parts > 1 and weights.size > 0
            own_weights = weights_of_part(weights, begin, count, group) if shared else logits
            attend_part(
                query[region], keys, values, begin, count, scale, softcap, own_weights,
                peaks[ticket], totals[ticket], partial[ticket], mass[begin:end] if squares else nothing,
            )  # fmt: skip
            if fetch_and_add_one(done[region : region + 1]) == parts - 1:
                merge_parts(
                    peaks[first : first + parts],
                    totals[first : first + parts],
                    partial[first : first + parts],
                    own_sinks,
                    out[region],
                )
                if mass.size > 0 and not squares:
                    for task in range(first, first + parts):
                        begin, count = table[task, BEGIN], table[task, COUNT]
                        if shared:
                            own_weights = weights_of_part(weights, begin, count, group)
                        add_mass(own_weights, peaks[task], mass[begin : begin + count])
        ticket = next_ticket(job, job[_TASKS])


@functools.cache
def plan_worker() -> Any:
    """The compiled loop that comes before."""
    sources = SOURCES

    def plan(address: Any) -> None:
        if sources:
            _plan(opened(address))

    return worker(plan)


@functools.cache
def decode_worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def decode(address: Any) -> None:
        if sources:
            _decode(address, element(0))

    return worker(decode)


_NewEntry = tuple[Tensor, Tensor, Tensor]
_Store = tuple[Tensor, Tensor, "Tensor | None", Tensor, Tensor]
_Mass = tuple["Tensor | None", MassOf]


def _attend(
    query: Tensor, new: _NewEntry | None, store: _Store, scale: float, softcap: float, sinks: Tensor | None, into: _Mass
) -> Tensor:
    keys, values, positions, start, length = store
    mass, squares = into[0], adds_squares(into[1])
    weighs = mass is not None and not squares
    single = readable(query, torch.float32)
    out = torch.empty_like(single)
    batch, heads = length.shape
    regions, (slots, size), dtype = batch * heads, keys.shape, keys.dtype
    if regions == 0:
        return out.to(query.dtype)
    group, entry = query.shape[1] // heads, [0, 0, 0]
    if new is not None:
        new_keys, new_values = readable(new[0], dtype), readable(new[1], dtype)
        new_positions = readable(new[2], torch.int32)
        entry = [
            address_of(new_keys, dtype, regions * size, "new_keys"),
            address_of(new_values, dtype, regions * size, "new_values"),
            address_of(new_positions, torch.int32, batch, "new_positions"),
        ]
    if sinks is not None:
        sinks = readable(sinks, torch.float32)
    tasks = most_tasks(regions, slots)
    counts = 8 * (tasks * COLUMNS + regions)  # bytes
    partial = counts + 4 * tasks * group * (size + 2)
    workspace = scratch(partial + (4 * slots * group if weighs else 0))
    table = workspace.data_ptr()
    numbers = [
        batch,
        group,
        size,
        slots,
        as_integer(scale),
        as_integer(softcap),
        address_of(single, torch.float32, regions * group * size, "query"),
        *entry,
        address_of(keys, dtype, slots * size, "keys"),
        address_of(values, dtype, slots * size, "values"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(sinks, torch.float32, heads * group, "sinks"),
        address_of(mass, torch.float32, slots, "mass"),
        int(squares),
        address_of(out, torch.float32, regions * group * size, "out"),
        tasks,
        table,
        table + 8 * tasks * COLUMNS,
        table + counts,
        table + partial if weighs else 0,
        0,
        0,
    ]
    run_job(decode_worker_for(dtype), numbers, regions, slots, slots * size, prepare=plan_worker())
    return out if query.dtype == torch.float32 else out.to(query.dtype)


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
    mass_of: MassOf = "attention",
) -> Tensor:
    """Attention of one query token per row over its regions, [B, H, D]. See `reference.ragged_decode`."""
    del max_length
    return _attend(query, None, (keys, values, None, start, length), scale, softcap, sinks, (mass, mass_of))


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
    mass_of: MassOf = "attention",
) -> Tensor:
    """`slot_write` and `ragged_decode` in one pass, [B, H, D]. See `reference.append_decode`."""
    del max_length
    new = (new_keys, new_values, new_positions)
    return _attend(query, new, (keys, values, positions, start, length), scale, softcap, sinks, (mass, mass_of))
