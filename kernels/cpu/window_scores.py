# SPDX-License-Identifier: Apache-2.0
"""Mean attention of a window of queries, pooled over neighbouring slots."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference_scores import check_pool
from .jit import SOURCES, jit, worker
from .job import FIRST, REGIONS, address_of, next_region, opened, run_job
from .memory import float32s, int32s
from .window_mass import window_mass

(_SLOTS, _HALF, _IS_MEAN, _MASS, _START, _LENGTH, _SCORES) = range(FIRST, FIRST + 7)


@jit
def _pool(mass: Any, half: int, is_mean: Any, scores: Any) -> None:
    """scores[j] = maximum or mean of mass[j - half .. j + half], cut at the ends."""
    for j in range(mass.size):
        first, end = max(j - half, 0), min(j + half + 1, mass.size)
        value = mass[first]
        for k in range(first + 1, end):
            value = value + mass[k] if is_mean else max(value, mass[k])
        scores[j] = value / np.float32(end - first) if is_mean else value


@jit
def _pool_all(address: int) -> None:
    job = opened(address)
    regions, slots = job[REGIONS], job[_SLOTS]
    mass, scores = float32s(job[_MASS], slots), float32s(job[_SCORES], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    region = next_region(job, length)
    while region >= 0:
        begin = np.int64(start[region])
        end = begin + np.int64(length[region])
        _pool(mass[begin:end], job[_HALF], job[_IS_MEAN] != 0, scores[begin:end])
        region = next_region(job, length)


@functools.cache
def the_worker() -> Any:
    """The compiled loop."""
    sources = SOURCES

    def pool_all(address: Any) -> None:
        if sources:
            _pool_all(address)

    return worker(pool_all)


def window_scores(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    pool: int = 1,
    pooling: str = "max",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`window_mass` pooled over neighbouring slots, [N] float32. See `reference.window_scores`."""
    check_pool(pool, pooling)
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, softcap=softcap, sinks=sinks
    )
    if pool == 1:
        return mass
    regions, slots = start.numel(), keys.shape[0]
    scores = torch.zeros_like(mass)
    numbers = [
        slots,
        pool // 2,
        int(pooling == "mean"),
        address_of(mass, torch.float32, slots, "mass"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(scores, torch.float32, slots, "scores"),
    ]
    run_job(the_worker(), numbers, regions, slots, slots * pool)
    return scores
