# SPDX-License-Identifier: Apache-2.0
"""Mean attention of a window of queries, per slot."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attend import group_logits
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
from .softmax import soft_cap, softmax_weights
from .tokens_needed import tokens_needed

(_BATCH, _WINDOW, _GROUP, _SIZE, _SLOTS, _SCALE, _QUERIES, _QUERY_POSITIONS, _KEYS, _POSITIONS) = range(
    FIRST, FIRST + 10
)
(_START, _LENGTH, _FIRST_POSITION, _SOFTCAP, _SINKS, _MASS) = range(FIRST + 10, FIRST + 16)

AT_ONCE = 32
"""Queries per pass over a region's keys: bounds the scratch to this many floats per slot of the longest region."""


@jit
def mask(logits: Any, positions: Any, newest: Any, oldest: Any) -> None:
    """-inf where a position is newer than `newest` or older than `oldest`."""
    for j in range(logits.size):
        position = positions[j]
        logits[j] = logits[j] if (position <= newest) & (position >= oldest) else np.float32(-np.inf)


@jit
def seen_by_any(positions: Any, begin: Any, count: Any, newest: Any) -> Any:
    """Slots up to the last that a query at `newest` sees: in a sorted region, half the work of a whole prompt."""
    while count > 0 and positions[begin + count - 1] > newest:
        count -= 1
    return count


@jit
def _window_mass(address: int, element: Any) -> None:
    job = opened(address)
    regions, window, group, size, slots = job[REGIONS], job[_WINDOW], job[_GROUP], job[_SIZE], job[_SLOTS]
    heads = regions // job[_BATCH]
    scale, softcap = as_float32(job, _SCALE), as_float32(job, _SOFTCAP)
    sinks = float32s(job[_SINKS], heads * group)
    has_sink = sinks.size > 0
    queries = cube(job[_QUERIES], regions, window * group, size, np.float32(0))  # the region's queries together
    query_positions = matrix(job[_QUERY_POSITIONS], job[_BATCH], window, np.int32(0))
    first_position = int32s(job[_FIRST_POSITION], job[_BATCH])
    keys = matrix(job[_KEYS], slots, size, element)
    positions = int32s(job[_POSITIONS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    mass = float32s(job[_MASS], slots)
    mean = np.float32(1.0 / (window * group))
    logits = np.empty((min(AT_ONCE, window * group), longest(length)), np.float32)
    region = next_region(job, length)
    while region >= 0:
        row = region // heads
        begin = np.int64(start[region])
        oldest = first_position[row] if first_position.size > 0 else np.int32(-(2**31))
        for q in range(0, window * group, AT_ONCE):
            block = queries[region, q : q + AT_ONCE]
            newest = np.int64(-(2**31))
            for r in range(block.shape[0]):
                newest = max(newest, np.int64(query_positions[row, (q + r) // group]))
            count = seen_by_any(positions, begin, np.int64(length[region]), newest)
            # Slices from here on: an index that might be negative keeps a loop from using vector registers.
            own_positions, own_mass = positions[begin : begin + count], mass[begin : begin + count]
            group_logits(block, keys, begin, count, scale, logits)
            for r in range(block.shape[0]):
                weights = logits[r, :count]
                if softcap > 0:
                    soft_cap(weights, softcap)
                mask(weights, own_positions, query_positions[row, (q + r) // group], oldest)
                sink = sinks[region % heads * group + (q + r) % group] if has_sink else np.float32(0.0)
                total = softmax_weights(weights, sink, has_sink)
                if total > 0:  # otherwise the query sees nothing
                    share = mean / total
                    for j in range(count):
                        own_mass[j] += weights[j] * share
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def window_mass(address: Any) -> None:
        if sources:
            _window_mass(address, element(0))

    return worker(window_mass)


def window_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean attention of a window of queries, per slot, [N] float32. See `reference.window_mass`."""
    batch, heads = start.shape
    regions, (slots, size), dtype = batch * heads, keys.shape, keys.dtype
    window, group = queries.shape[1], queries.shape[2] // max(heads, 1)
    # [B, Q, G, R, D] -> [B, G, Q, R, D]: what one region needs lies together.
    own = queries.reshape(batch, window, heads, group, size).transpose(1, 2).to(torch.float32).contiguous()
    query_positions = readable(query_positions, torch.int32)
    if first_position is not None:
        first_position = readable(first_position, torch.int32)
    if sinks is not None:
        sinks = readable(sinks, torch.float32)
    mass = torch.zeros(slots, dtype=torch.float32)
    numbers = [
        batch,
        window,
        group,
        size,
        slots,
        as_integer(scale),
        address_of(own, torch.float32, regions * window * group * size, "queries"),
        address_of(query_positions, torch.int32, batch * window, "query_positions"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(first_position, torch.int32, batch, "first_position"),
        as_integer(softcap),
        address_of(sinks, torch.float32, heads * group, "sinks"),
        address_of(mass, torch.float32, slots, "mass"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size * window)
    return mass


def head_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    tau: float,
    first_position: Tensor | None = None,
) -> Tensor:
    """Tokens needed for a share `tau` of the window's attention, [B, G] int32. See `reference.head_mass`."""
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, first_position=first_position
    )
    return tokens_needed(mass, positions, start, length, tau=tau)
