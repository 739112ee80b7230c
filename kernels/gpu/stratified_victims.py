# SPDX-License-Identifier: Apache-2.0
"""`stratified_victims`: which entries leave each region, for regions of any length, without a sort.

One program per region. What a sort would answer is found by bisection with counts, one pass over the region per step:
the position that cuts the long stratum from the near one, then for both strata at once the key of the last victim. Keys
are 64 bits, score above position, so they are unique and equal scores let the older entry go first. A step stops early
when its count is exact; 32 + 64 passes are the most there can be, and a short region stays in the cache meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import STRATA_UNITS
from .common import OPTIONS, check_contiguous

_BLOCK = 1024
_LOWEST = tl.constexpr(-(2**63))
_HIGHEST = tl.constexpr(2**63 - 1)
_UNITS = tl.constexpr(STRATA_UNITS)


@triton.jit
def _keys(scores, position, slots, ok):
    """int64 keys whose order is (score, position); -0.0 counts as 0.0."""
    score = tl.load(scores + slots, mask=ok, other=0.0).to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats fall as their bits rise
    return (ordered.to(tl.int64) << 32) | position.to(tl.int64)


@triton.jit
def _count_before(positions, base, n, lo, hi, BLOCK: tl.constexpr):
    """Entries with lo <= position < hi."""
    count = 0
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        position = tl.load(positions + base + t, mask=t < n, other=-1)
        count += tl.sum(((t < n) & (position >= lo) & (position < hi)).to(tl.int32), 0)
    return count


@triton.jit
def _middle(lo, hi):
    """Floor of the mean of two int64 whose sum may overflow."""
    return (lo & hi) + ((lo ^ hi) >> 1)


@triton.jit
def stratified_victims_kernel(
    scores,  # [N]
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    first_evictable,  # [B, G]
    last_evictable,  # [B, G]
    evict,  # [B, G]
    victims,  # [N] uint8
    ratio_units,
    BLOCK: tl.constexpr,
):
    """One program per region."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    oldest = tl.maximum(tl.load(first_evictable + row), 0).to(tl.int64)
    newest = tl.load(last_evictable + row).to(tl.int64)
    total = _count_before(positions, base, n, oldest, newest, BLOCK)
    count = tl.minimum(tl.maximum(tl.load(evict + row), 0), total)
    if count <= 0:
        return
    n_long = (total.to(tl.int64) * ratio_units // _UNITS).to(tl.int32)
    from_near = tl.minimum(count - count // 2, total - n_long)
    from_long = tl.minimum(count - from_near, n_long)
    from_near = count - from_long

    # The cut: the smallest position with at least `n_long` candidates before it.
    lo = oldest
    hi = newest
    while lo < hi:
        mid = lo + (hi - lo) // 2
        before = _count_before(positions, base, n, oldest, mid, BLOCK)
        if before < n_long:
            lo = mid + 1
        else:
            hi = mid
        if before == n_long:
            lo = mid
    cut = lo

    # Per stratum: the smallest key that has at least as many keys up to it as the stratum must give.
    lo_long = total.to(tl.int64) * 0 + _LOWEST
    hi_long = total.to(tl.int64) * 0 + _HIGHEST
    if from_long == 0:
        hi_long = lo_long  # no key is that low
    lo_near = total.to(tl.int64) * 0 + _LOWEST
    hi_near = total.to(tl.int64) * 0 + _HIGHEST
    if from_near == 0:
        hi_near = lo_near
    while (lo_long < hi_long) | (lo_near < hi_near):
        mid_long = _middle(lo_long, hi_long)
        mid_near = _middle(lo_near, hi_near)
        below_long = 0
        below_near = 0
        for first in tl.range(0, n, BLOCK):
            t = first + tl.arange(0, BLOCK)
            ok = t < n
            position = tl.load(positions + base + t, mask=ok, other=-1)
            key = _keys(scores, position, base + t, ok)
            below_long += tl.sum((ok & (position >= oldest) & (position < cut) & (key <= mid_long)).to(tl.int32), 0)
            below_near += tl.sum((ok & (position >= cut) & (position < newest) & (key <= mid_near)).to(tl.int32), 0)
        if below_long < from_long:
            lo_long = tl.minimum(mid_long + 1, hi_long)
        else:
            hi_long = mid_long
        if below_long == from_long:
            lo_long = hi_long
        if below_near < from_near:
            lo_near = tl.minimum(mid_near + 1, hi_near)
        else:
            hi_near = mid_near
        if below_near == from_near:
            lo_near = hi_near

    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        ok = t < n
        position = tl.load(positions + base + t, mask=ok, other=-1)
        key = _keys(scores, position, base + t, ok)
        long = (position >= oldest) & (position < cut) & (key <= hi_long)
        near = (position >= cut) & (position < newest) & (key <= hi_near)
        tl.store(victims + base + t, (long | near).to(tl.uint8), mask=ok)


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
    """Choose what leaves each region. See `headkv_mm.kernels.reference.stratified_victims`.

    Scores are compared as float32 and must not be NaN; positions of a region are unique.

    Returns:
        [N] bool, True for the victims.
    """
    check_contiguous(scores=scores, positions=positions)
    victims = torch.zeros(positions.shape[0], dtype=torch.uint8, device=positions.device)
    if start.numel():
        stratified_victims_kernel[(start.numel(),)](
            scores,
            positions,
            start.contiguous(),
            length.contiguous(),
            first.contiguous(),
            last.contiguous(),
            evict.contiguous(),
            victims,
            round(strata_ratio * STRATA_UNITS),
            BLOCK=_BLOCK,
            **OPTIONS,
        )
    return victims.view(torch.bool)
