# SPDX-License-Identifier: Apache-2.0
"""How much every query attends to what lies behind its own window."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference_behind import check_power
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
from .window_mass import AT_ONCE, mask, seen_by_any

(_BATCH, _WINDOW, _GROUP, _SIZE, _SLOTS, _SCALE, _QUERIES, _QUERY_POSITIONS, _KEYS, _POSITIONS) = range(
    FIRST, FIRST + 10
)
(_START, _LENGTH, _BEHIND, _SQUARED, _FIRST_POSITION, _SOFTCAP, _SINKS, _FOUND) = range(FIRST + 10, FIRST + 18)


@jit
def _summed(shares: Any, positions: Any, oldest: Any, newest: Any, squared: Any) -> Any:
    """The sum of the shares, or of their squares, of the positions `oldest .. newest`, float64."""
    total = np.float64(0.0)
    for j in range(shares.size):
        share = np.float64(shares[j] if (positions[j] >= oldest) & (positions[j] <= newest) else np.float32(0.0))
        total += share * share if squared else share
    return total


@jit
def _average(weights: Any, count: Any, factors: Any) -> None:
    """weights[0, :count] becomes the sum over r of weights[r, :count] * factors[r]."""
    first, factor = weights[0, :count], factors[0]
    for j in range(count):
        first[j] *= factor
    for r in range(1, factors.size):
        row, factor = weights[r, :count], factors[r]
        for j in range(count):
            first[j] += row[j] * factor


@jit
def _attention_behind(address: int, element: Any) -> None:
    job = opened(address)
    batch, regions, group, size, slots = job[_BATCH], job[REGIONS], job[_GROUP], job[_SIZE], job[_SLOTS]
    heads, window = regions // batch, job[_WINDOW]
    scale, softcap, squared = as_float32(job, _SCALE), as_float32(job, _SOFTCAP), job[_SQUARED] != 0
    sinks = float32s(job[_SINKS], heads * group)
    has_sink = sinks.size > 0
    queries = cube(job[_QUERIES], batch * window, heads * group, size, np.float32(0))
    query_positions = matrix(job[_QUERY_POSITIONS], batch, window, np.int32(0))
    keys = matrix(job[_KEYS], slots, size, element)
    positions = int32s(job[_POSITIONS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    behind, first_position = int32s(job[_BEHIND], batch), int32s(job[_FIRST_POSITION], batch)
    found = float32s(job[_FOUND], regions)
    at_once = max(min(AT_ONCE // group, window), 1)  # queries, each with all its heads
    block, block_positions = np.empty((at_once * group, size), np.float32), np.empty(at_once, np.int32)
    logits = np.empty((at_once * group, longest(length)), np.float32)
    factors = np.empty(group, np.float32)
    region = next_region(job, length)
    while region >= 0:
        row, h, begin = region // heads, region % heads * group, np.int64(start[region])
        oldest = first_position[row] if first_position.size > 0 else np.int32(0)
        total, real, q = np.float64(0.0), 0, 0
        while q < window:
            # Only real queries make up blocks: what a query is computed beside, and so how sums are rounded, does not
            # depend on how far its row is padded.
            held, newest = 0, np.int64(-1)
            while q < window and held < at_once:
                position = query_positions[row, q]
                if position >= 0:
                    block[held * group : (held + 1) * group] = queries[row * window + q, h : h + group]
                    block_positions[held] = position
                    newest = max(newest, np.int64(position))
                    held += 1
                q += 1
            real += held
            count = seen_by_any(positions, begin, np.int64(length[region]), newest)
            own_positions = positions[begin : begin + count]
            group_logits(block[: held * group], keys, begin, count, scale, logits)
            for i in range(held):
                position = block_positions[i]
                for r in range(group):
                    weights = logits[i * group + r, :count]
                    if softcap > 0:
                        soft_cap(weights, softcap)
                    mask(weights, own_positions, position, np.int32(-(2**31)))
                    whole = softmax_weights(weights, sinks[h + r] if has_sink else np.float32(0.0), has_sink)
                    # Nothing is seen where the whole is 0; NaN must be seen in the output.
                    factors[r] = np.float32(0.0) if whole == 0 else np.float32(1.0) / (whole * np.float32(group))
                _average(logits[i * group :], count, factors)
                last = np.int32(position - behind[row])
                total += _summed(logits[i * group, :count], own_positions, oldest, last, squared)
        found[region] = np.float32(total / np.float64(max(real, 1)))
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def attention_behind(address: Any) -> None:
        if sources:
            _attention_behind(address, element(0))

    return worker(attention_behind)


def attention_behind(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    window: Tensor,
    *,
    scale: float,
    power: int = 1,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that queries give to what lies behind their windows, [B, G]. See `reference.attention_behind`."""
    check_power(power)
    batch, heads = start.shape
    regions, (slots, size), dtype = batch * heads, keys.shape, keys.dtype
    count, group = queries.shape[1], queries.shape[2] // max(heads, 1)
    queries = readable(queries, torch.float32)
    query_positions, window = readable(query_positions, torch.int32), readable(window, torch.int32)
    if first_position is not None:
        first_position = readable(first_position, torch.int32)
    if sinks is not None:
        sinks = readable(sinks, torch.float32)
    found = torch.zeros(batch, heads, dtype=torch.float32)
    numbers = [
        batch,
        count,
        group,
        size,
        slots,
        as_integer(scale),
        address_of(queries, torch.float32, regions * count * group * size, "queries"),
        address_of(query_positions, torch.int32, batch * count, "query_positions"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(window, torch.int32, batch, "window"),
        power - 1,
        address_of(first_position, torch.int32, batch, "first_position"),
        as_integer(softcap),
        address_of(sinks, torch.float32, heads * group, "sinks"),
        address_of(found, torch.float32, regions, "found"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size * count)
    return found
