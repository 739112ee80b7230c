# SPDX-License-Identifier: Apache-2.0
"""`tokens_needed` and `head_mass`: how many of the newest entries hold a share of a region's mass.

Regions are packed, not sorted. Instead of sorting, one program per region bisects the position p: the mass of entries
at or after p falls as p rises, and the answer is the number of entries at or after the last p that still reaches the
target. Each step is one pass over positions and mass, about log2(range of positions) passes for any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, check_contiguous
from .window_mass import window_mass

_BLOCK = 1024


@triton.jit
def _mass_since(positions, mass, base, n, since, BLOCK: tl.constexpr):
    """Mass and number of the entries at or after a position.

    The order of additions depends on the slots only, and rounding is monotone, so the sum never rises with `since`.
    """
    found = 0.0
    count = 0
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        ok = t < n
        newer = ok & (tl.load(positions + base + t, mask=ok, other=-1) >= since)
        found += tl.sum(tl.where(newer, tl.load(mass + base + t, mask=ok, other=0.0).to(tl.float32), 0.0), 0)
        count += tl.sum(newer.to(tl.int32), 0)
    return found, count


@triton.jit
def tokens_needed_kernel(mass, positions, start, length, needed, tau, BLOCK: tl.constexpr):
    """One program per region."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    newest = -1
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        newest = tl.maximum(newest, tl.max(tl.load(positions + base + t, mask=t < n, other=-1), 0))
    total, count = _mass_since(positions, mass, base, n, 0, BLOCK)
    # Invariant: entries at or after `lo` reach the target, those at or after `hi` do not.
    lo = newest * 0
    hi = newest + 1
    if tau * total <= 0.0:
        lo = newest  # any entry reaches nothing: the newest is counted, as in a cumulative sum
    while lo + 1 < hi:
        mid = lo + (hi - lo) // 2
        found, newer = _mass_since(positions, mass, base, n, mid, BLOCK)
        if found < tau * total:
            hi = mid
        else:
            lo = mid
            count = newer
    if lo == newest:
        count = 1
    tl.store(needed + row, tl.where(total > 0.0, count, 0))


def tokens_needed(mass: Tensor, positions: Tensor, start: Tensor, length: Tensor, *, tau: float) -> Tensor:
    """How many of the newest entries hold a share `tau` of each region's mass.

    See `headkv_mm.kernels.reference.tokens_needed`. Sums are float32 in slot order, so a region in which a cumulative
    sum comes within rounding of the target may differ from the reference by an entry.

    Returns:
        [B, G] int32; 0 for an empty region or one without mass.
    """
    check_contiguous(mass=mass, positions=positions)
    needed = torch.zeros_like(start, memory_format=torch.contiguous_format)
    if start.numel():
        tokens_needed_kernel[(start.numel(),)](
            mass, positions, start.contiguous(), length.contiguous(), needed, float(tau), BLOCK=_BLOCK, **OPTIONS
        )
    return needed


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
    """Tokens needed for a share `tau` of the window's attention. See `headkv_mm.kernels.reference.head_mass`.

    Returns:
        [B, G] int32.
    """
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, first_position=first_position
    )
    return tokens_needed(mass, positions, start, length, tau=tau)
