# SPDX-License-Identifier: Apache-2.0
"""How much of a layer's output each slot carries for a window of queries."""

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
from .window_mass import AT_ONCE, mask, seen_by_any

(_BATCH, _WINDOW, _GROUP, _SIZE, _SLOTS, _SCALE, _QUERIES, _QUERY_POSITIONS, _KEYS, _POSITIONS) = range(
    FIRST, FIRST + 10
)
(_START, _LENGTH, _VALUE_NORMS, _SOFTCAP, _SINKS, _NORMS) = range(FIRST + 10, FIRST + 16)


@jit
def _window_norms(address: int, element: Any) -> None:
    job = opened(address)
    regions, window, group, size, slots = job[REGIONS], job[_WINDOW], job[_GROUP], job[_SIZE], job[_SLOTS]
    heads = regions // job[_BATCH]
    scale, softcap = as_float32(job, _SCALE), as_float32(job, _SOFTCAP)
    sinks = float32s(job[_SINKS], heads * group)
    has_sink = sinks.size > 0
    # Head after head, so that a head's squares are summed before the next one's.
    queries = cube(job[_QUERIES], regions * group, window, size, np.float32(0))
    query_positions = matrix(job[_QUERY_POSITIONS], job[_BATCH], window, np.int32(0))
    keys = matrix(job[_KEYS], slots, size, element)
    positions = int32s(job[_POSITIONS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    value_norms = matrix(job[_VALUE_NORMS], slots, group, np.float32(0))
    norms = float32s(job[_NORMS], slots)
    logits = np.empty((min(AT_ONCE, window), longest(length)), np.float32)
    squares = np.empty(longest(length), np.float32)
    region = next_region(job, length)
    while region >= 0:
        row, begin, filled = region // heads, np.int64(start[region]), np.int64(length[region])
        for r in range(group):
            squares[:filled] = np.float32(0.0)
            for q in range(0, window, AT_ONCE):
                block = queries[region * group + r, q : q + AT_ONCE]
                newest = np.int64(-(2**31))
                for w in range(block.shape[0]):
                    newest = max(newest, np.int64(query_positions[row, q + w]))
                count = seen_by_any(positions, begin, filled, newest)
                own_positions, own_squares = positions[begin : begin + count], squares[:count]
                group_logits(block, keys, begin, count, scale, logits)
                for w in range(block.shape[0]):
                    weights = logits[w, :count]
                    if softcap > 0:
                        soft_cap(weights, softcap)
                    mask(weights, own_positions, query_positions[row, q + w], np.int32(-(2**31)))
                    sink = sinks[region % heads * group + r] if has_sink else np.float32(0.0)
                    total = softmax_weights(weights, sink, has_sink)
                    if total > 0:  # otherwise the query sees nothing
                        share = np.float32(1.0) / total
                        for j in range(count):
                            weight = weights[j] * share
                            own_squares[j] += weight * weight
            for j in range(filled):
                norms[begin + j] += np.sqrt(squares[j]) * value_norms[begin + j, r] / np.float32(group)
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def window_norms(address: Any) -> None:
        if sources:
            _window_norms(address, element(0))

    return worker(window_norms)


def window_norms(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    value_norms: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Norm of what each slot adds to the output, [N] float32. See `reference.window_norms`."""
    batch, heads = start.shape
    regions, (slots, size), dtype = batch * heads, keys.shape, keys.dtype
    window, group = queries.shape[1], queries.shape[2] // max(heads, 1)
    own = queries.transpose(1, 2).to(torch.float32).contiguous()  # [B, H, Q, D]
    query_positions = readable(query_positions, torch.int32)
    value_norms = readable(value_norms, torch.float32)
    if sinks is not None:
        sinks = readable(sinks, torch.float32)
    norms = torch.zeros(slots, dtype=torch.float32)
    numbers = [
        batch,
        window,
        group,
        size,
        slots,
        as_integer(scale),
        address_of(own, torch.float32, regions * group * window * size, "queries"),
        address_of(query_positions, torch.int32, batch * window, "query_positions"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(value_norms, torch.float32, slots * group, "value_norms"),
        as_integer(softcap),
        address_of(sinks, torch.float32, heads * group, "sinks"),
        address_of(norms, torch.float32, slots, "norms"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size * window)
    return norms
