# SPDX-License-Identifier: Apache-2.0
"""`mean_query_logits`: the logit of a group's mean query for every slot, one pass over the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, block_slots, check_storage, load_tile, padded_head_size, programs_per_region


@triton.jit
def mean_query_logits_kernel(
    mean_query,  # [B, H, D]
    keys,  # [N, D]
    start,  # [B, G]
    length,  # [B, G]
    logits,  # [N] float32
    scale,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Several programs per region, each on every n-th block."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    r = tl.arange(0, RP)
    q = load_tile(mean_query, row * R + r, r < R, D, DP).to(tl.float32)
    q_mean = tl.sum(q, 0) / R  # [DP]
    for first in tl.range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        k = load_tile(keys, base + t, t < n, D, DP).to(tl.float32)
        tl.store(logits + base + t, tl.sum(k * q_mean[None, :], 1) * scale, mask=t < n)


def mean_query_logits(mean_query: Tensor, keys: Tensor, start: Tensor, length: Tensor, *, scale: float) -> Tensor:
    """Logit of the mean query for every slot. See `headkv_mm.kernels.reference.mean_query_logits`.

    Returns:
        [N] float32, zero outside the regions.
    """
    check_storage(keys)
    logits = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device)
    regions, size = start.numel(), keys.shape[-1]
    if regions == 0:
        return logits
    group = mean_query.shape[1] // start.shape[1]
    block = block_slots(size, keys.dtype)
    mean_query_logits_kernel[(regions, programs_per_region(regions, keys.shape[0], block))](
        mean_query.contiguous(),
        keys,
        start.contiguous(),
        length.contiguous(),
        logits,
        float(scale),
        R=group,
        RP=int(triton.next_power_of_2(group)),
        D=size,
        DP=padded_head_size(size),
        BLOCK_N=block,
        **OPTIONS,
    )
    return logits
