# SPDX-License-Identifier: Apache-2.0
"""Logit of the mean query for every slot, averaged over the group."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attend import group_logits
from .jit import SOURCES, jit, worker
from .job import FIRST, REGIONS, address_of, as_float32, as_integer, element_of, next_region, opened, run_job
from .memory import cube, float32s, int32s, matrix

(_SIZE, _SLOTS, _SCALE, _QUERY, _KEYS, _START, _LENGTH, _LOGITS) = range(FIRST, FIRST + 8)


@jit
def _mean_query_logits(address: int, element: Any) -> None:
    job = opened(address)
    regions, size, slots, scale = job[REGIONS], job[_SIZE], job[_SLOTS], as_float32(job, _SCALE)
    query = cube(job[_QUERY], regions, 1, size, np.float32(0))
    keys = matrix(job[_KEYS], slots, size, element)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    logits = float32s(job[_LOGITS], slots)
    region = next_region(job, length)
    while region >= 0:
        begin, count = np.int64(start[region]), np.int64(length[region])
        group_logits(query[region], keys, begin, count, scale, logits[begin : begin + count].reshape((1, count)))
        region = next_region(job, length)


@functools.cache
def worker_for(dtype: torch.dtype) -> Any:
    """The compiled loop for storage of this dtype."""
    element, sources = element_of(dtype), SOURCES

    def mean_query_logits(address: Any) -> None:
        if sources:
            _mean_query_logits(address, element(0))

    return worker(mean_query_logits)


def mean_query_logits(mean_query: Tensor, keys: Tensor, start: Tensor, length: Tensor, *, scale: float) -> Tensor:
    """Logit of the mean query for every slot, [N] float32. See `reference.mean_query_logits`."""
    heads, regions, (slots, size), dtype = start.shape[1], start.numel(), keys.shape, keys.dtype
    group = mean_query.shape[1] // max(heads, 1)
    group_mean = mean_query.reshape(-1, heads, group, size).mean(2).float().contiguous()  # [B, G, D]
    logits = torch.zeros(slots, dtype=torch.float32)
    numbers = [
        size,
        slots,
        as_integer(scale),
        address_of(group_mean, torch.float32, regions * size, "mean_query"),
        address_of(keys, dtype, slots * size, "keys"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(logits, torch.float32, slots, "logits"),
    ]
    run_job(worker_for(dtype), numbers, regions, slots, slots * size)
    return logits
