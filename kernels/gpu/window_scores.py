# SPDX-License-Identifier: Apache-2.0
"""`window_scores`: `window_mass`, pooled over neighbouring slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_scores import check_pool
from .common import OPTIONS, programs_per_region
from .window_mass import window_mass

_BLOCK = 256


@triton.jit
def pool_kernel(
    mass,  # [N] float32, not negative
    start,  # [B, G]
    length,  # [B, G]
    scores,  # [N] float32
    HALF: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Several programs per region, each on every n-th block of slots."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    for first in tl.range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        t = first + tl.arange(0, BLOCK)
        ok = t < n
        value = tl.zeros([BLOCK], tl.float32)
        for offset in tl.range(-HALF, HALF + 1):
            near = t + offset
            # What lies outside the region counts as 0: it changes neither a sum nor a maximum of masses.
            other = tl.load(mass + base + near, mask=ok & (near >= 0) & (near < n), other=0.0)
            if MEAN:
                value += other
            else:
                value = tl.maximum(value, other)
        if MEAN:
            value = value / (tl.minimum(t + HALF + 1, n) - tl.maximum(t - HALF, 0)).to(tl.float32)
        tl.store(scores + base + t, value, mask=ok)


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
    """`window_mass`, pooled over neighbouring slots. See `headkv_mm.kernels.reference.window_scores`.

    Returns:
        [N] float32, zero outside the regions.
    """
    check_pool(pool, pooling)
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, softcap=softcap, sinks=sinks
    )
    regions = start.numel()
    if pool == 1 or regions == 0:
        return mass
    start, length = start.contiguous(), length.contiguous()
    scores = torch.zeros_like(mass)
    pool_kernel[(regions, programs_per_region(regions, keys.shape[0], _BLOCK))](
        mass, start, length, scores, HALF=pool // 2, MEAN=pooling == "mean", BLOCK=_BLOCK, **OPTIONS
    )
    return scores
