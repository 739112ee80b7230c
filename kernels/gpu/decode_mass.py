# SPDX-License-Identifier: Apache-2.0
"""The attention that one decode step gave to each slot, added to a running mass.

A second pass over the keys with the log-sum-exp of the decode: weights need the sum of the whole region, which no
program of the first pass has. The keys were read a moment ago, so most of them still sit in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    CHUNK,
    STAGES,
    block_slots,
    decode_options,
    dot_keys,
    load_tile,
    logits_base2,
    padded_group,
    padded_head_size,
    upcast,
)


@triton.jit
def decode_mass_kernel(
    query,  # [B, H, D]
    keys,  # [N, D]
    start,  # [B, G]
    length,  # [B, G]
    lse,  # [B, H] float32, base 2
    mass,  # [N] float32
    scale,
    softcap,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per region and chunk."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    lo = tl.program_id(1) * CHUNK
    if lo >= n:
        return
    hi = tl.minimum(n, lo + CHUNK)
    base = tl.load(start + row).to(tl.int64)
    r = tl.arange(0, RP)
    q = load_tile(query, row * R + r, r < R, D, DP)
    total = tl.load(lse + row * R + r, mask=r < R, other=0.0)
    for first in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        t = first + tl.arange(0, BLOCK_N)
        ok = t < hi
        k = load_tile(keys, base + t, ok, D, DP)
        logits = logits_base2(dot_keys(q, k, UPCAST), scale, softcap, SOFTCAP)  # [RP, BLOCK_N]
        weights = tl.where((r < R)[:, None], tl.exp2(logits - total[:, None]), 0.0)
        old = tl.load(mass + base + t, mask=ok, other=0.0)
        tl.store(mass + base + t, old + tl.sum(weights, 0), mask=ok)


def add_decode_mass(
    query: Tensor,
    keys: Tensor,
    start: Tensor,
    length: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    scale: float,
    softcap: float,
    max_length: int,
) -> None:
    """Add each slot's weight, summed over the group's query heads, to `mass`, in place.

    Args:
        query: [B, H, D], contiguous.
        lse: [B, H] float32, log-sum-exp of the logits in base 2, sinks included.
        mass: [N] float32.
        max_length: bound of `length`.
    """
    size = keys.shape[-1]
    group = query.shape[1] // start.shape[1]
    decode_mass_kernel[(start.numel(), triton.cdiv(max_length, CHUNK))](
        query,
        keys,
        start,
        length,
        lse,
        mass,
        float(scale),
        float(softcap),
        R=group,
        RP=padded_group(group),
        D=size,
        DP=padded_head_size(size),
        CHUNK=CHUNK,
        BLOCK_N=block_slots(size, keys.dtype),
        SOFTCAP=softcap > 0,
        UPCAST=upcast(query, keys),
        STAGES=STAGES,
        **decode_options(query, keys),
    )
