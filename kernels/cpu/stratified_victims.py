# SPDX-License-Identifier: Apache-2.0
"""Stratified token eviction: which entries leave each region (arXiv 2605.20600)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference import STRATA_UNITS
from .jit import SOURCES, exact_jit, worker
from .job import FIRST, REGIONS, address_of, next_region, opened, readable, run_job
from .memory import float32s, int32s, vector

(_SLOTS, _UNITS, _SCORES, _POSITIONS, _START, _LENGTH, _FIRST, _LAST, _EVICT, _VICTIMS) = range(FIRST, FIRST + 10)

_SORTING = 32
"""Reads per entry that two sorts are worth, for the choice of threads."""


@exact_jit
def _take_lowest(scores: Any, stratum: Any, count: int, victims: Any) -> None:
    """Flag the `count` entries of a stratum with the lowest scores; `stratum` holds slots, oldest first."""
    if count > 0:
        # A stable sort of entries in position order puts the older of two equals first.
        order = np.argsort(scores[stratum], kind="mergesort")
        for j in order[:count]:
            victims[stratum[j]] = np.uint8(1)


@exact_jit
def _stratified_victims(address: int) -> None:
    job = opened(address)
    regions, slots, units = job[REGIONS], job[_SLOTS], job[_UNITS]
    scores, positions = float32s(job[_SCORES], slots), int32s(job[_POSITIONS], slots)
    start, length = int32s(job[_START], regions), int32s(job[_LENGTH], regions)
    first, last = int32s(job[_FIRST], regions), int32s(job[_LAST], regions)
    evict = int32s(job[_EVICT], regions)
    victims = vector(job[_VICTIMS], slots, np.uint8(0))
    region = next_region(job, length)
    while region >= 0:
        begin = np.int64(start[region])
        end = begin + np.int64(length[region])
        candidates = np.empty(end - begin, np.int64)
        total = 0
        for slot in range(begin, end):
            if first[region] <= positions[slot] < last[region]:
                candidates[total] = slot
                total += 1
        count: Any = min(np.int64(evict[region]), total)
        if count > 0:
            oldest_first = candidates[:total][np.argsort(positions[candidates[:total]])]
            in_long = total * units // STRATA_UNITS
            from_near = min(count - count // 2, total - in_long)
            from_long = min(count - from_near, in_long)
            _take_lowest(scores, oldest_first[:in_long], from_long, victims)
            _take_lowest(scores, oldest_first[in_long:], count - from_long, victims)
        region = next_region(job, length)


@functools.cache
def the_worker() -> Any:
    """The compiled loop."""
    sources = SOURCES

    def stratified_victims(address: Any) -> None:
        if sources:
            _stratified_victims(address)

    return worker(stratified_victims)


def stratified_victims(
    scores: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    evict: Tensor,
    strata_ratio: float,
) -> Tensor:
    """Choose what leaves each region, [N] bool. See `reference.stratified_victims`."""
    regions, slots = start.numel(), positions.numel()
    scores = readable(scores, torch.float32)
    first, last, evict = (readable(bound, torch.int32) for bound in (first, last, evict))
    victims = torch.zeros(slots, dtype=torch.bool)
    numbers = [
        slots,
        round(strata_ratio * STRATA_UNITS),
        address_of(scores, torch.float32, slots, "scores"),
        address_of(positions, torch.int32, slots, "positions"),
        address_of(start, torch.int32, regions, "start"),
        address_of(length, torch.int32, regions, "length"),
        address_of(first, torch.int32, regions, "first"),
        address_of(last, torch.int32, regions, "last"),
        address_of(evict, torch.int32, regions, "evict"),
        address_of(victims, torch.bool, slots, "victims"),
    ]
    run_job(the_worker(), numbers, regions, slots, slots * _SORTING)
    return victims
