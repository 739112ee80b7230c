# SPDX-License-Identifier: Apache-2.0
"""The decode step of one layer: write the new entry of each region, then attend over the region.

Both happen in one parallel loop, region by region, so the new key is still in cache when it is read. The compiled
functions take tuples, which keeps their parameter lists short:

    new    (keys [B*G, D], values [B*G, D], positions [B]), all empty when nothing is appended
    store  (keys, values, positions, start, length, mass) as in `reference`, start and length flattened
    how    (scale, softcap, sinks)
"""

from __future__ import annotations

from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from .arrays import NO_FLOATS, NO_INTS, Array, floats, in_place, ints, readable
from .attend import attend
from .bits import take_ticket
from .jit import jit, parallel_jit
from .regions import longest, work_order
from .threads import thread_count


@jit
def append(i: int, new: Any, store: Any) -> None:
    """Write the new entry of region i into the slot after its last."""
    new_keys, new_values, new_positions = new
    keys, values, positions, start, length, mass = store
    slot = np.int64(start[i]) + np.int64(length[i])
    for d in range(keys.shape[1]):
        keys[slot, d] = new_keys[i, d]
        values[slot, d] = new_values[i, d]
    positions[slot] = new_positions[i // (length.size // new_positions.size)]
    if mass.size > 0:
        mass[slot] = np.float32(0.0)
    length[i] += 1


@jit
def _append_all(new: Any, store: Any) -> None:
    for i in range(store[4].size):
        append(i, new, store)


@jit
def _region(i: int, query: Any, new: Any, store: Any, how: Any, logits: Any, out: Any) -> None:
    if new[0].shape[0] > 0:
        append(i, new, store)
    keys, values, positions, start, length, mass = store
    scale, softcap, sinks = how
    group = query.shape[1]
    if sinks.size > 0:  # [H]: region i = b * G + g holds the query heads from g * R
        first = i * group % sinks.size
        sinks = sinks[first : first + group]
    begin, count = np.int64(start[i]), np.int64(length[i])
    attend(query[i], keys, values, begin, count, scale, softcap, sinks, mass, logits, out[i])


@jit
def _decode_serial(threads: int, query: Any, new: Any, store: Any, how: Any, out: Any) -> None:
    length = store[4]
    logits = np.empty((query.shape[1], longest(length) + 1), np.float32)
    for i in range(length.size):
        _region(i, query, new, store, how, logits, out)


@parallel_jit
def _decode_parallel(threads: int, query: Any, new: Any, store: Any, how: Any, out: Any) -> None:
    length = store[4]
    capacity = longest(length) + 1
    order = work_order(length)
    counter = np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        logits = np.empty((query.shape[1], capacity), np.float32)
        ticket = take_ticket(counter)
        while ticket < order.size:
            _region(order[ticket], query, new, store, how, logits, out)
            ticket = take_ticket(counter)


def _new_entry(new_keys: Tensor, new_values: Tensor, new_positions: Tensor, keys: Tensor) -> tuple[Array, Array, Array]:
    size = keys.shape[1]
    return (
        readable(new_keys, keys.dtype).reshape(-1, size),
        readable(new_values, keys.dtype).reshape(-1, size),
        ints(new_positions),
    )


def _store(
    keys: Tensor, values: Tensor, positions: Array, start: Tensor, length: Tensor, mass: Tensor | None
) -> tuple[Array, ...]:
    return (
        in_place(keys, "keys"),
        in_place(values, "values"),
        positions,
        ints(start).reshape(-1),
        in_place(length, "length").reshape(-1),
        NO_FLOATS if mass is None else in_place(mass, "mass"),
    )


def _decode(
    query: Tensor,
    new: tuple[Array, Array, Array],
    store: tuple[Array, ...],
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    out = torch.empty(query.shape, dtype=torch.float32)
    regions = store[4].size
    if regions == 0:
        return out.to(query.dtype)
    shape = (regions, query.shape[0] * query.shape[1] // regions, query.shape[2])  # [B * G, R, D]
    threads = thread_count(store[0].size)
    run = _decode_serial if threads == 1 else _decode_parallel
    how = (np.float32(scale), np.float32(softcap), floats(sinks))
    run(threads, readable(query, torch.float32).reshape(shape), new, store, how, out.numpy().reshape(shape))
    return out.to(query.dtype)


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
    if length.numel() > 0:
        new = _new_entry(new_keys, new_values, new_positions, keys)
        _append_all(new, _store(keys, values, in_place(positions, "positions"), start, length, mass))


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
    store = _store(keys, values, NO_INTS, start, length, mass)
    nothing = np.empty((0, keys.shape[1]), store[0].dtype)
    return _decode(query, (nothing, nothing, NO_INTS), store, scale, softcap, sinks)


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
    new = _new_entry(new_keys, new_values, new_positions, keys)
    store = _store(keys, values, in_place(positions, "positions"), start, length, mass)
    return _decode(query, new, store, scale, softcap, sinks)
