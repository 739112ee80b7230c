# SPDX-License-Identifier: Apache-2.0
"""`window_norms`: how much of a layer's output each slot carries for a window of queries.

The log-sum-exps come from the first pass of `window_mass`. The second pass goes head by head through the group, since
squares are summed over the window before the root is taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    OPTIONS,
    block_slots,
    check_storage,
    dot_keys,
    load_tile,
    logits_base2,
    padded_head_size,
    programs_per_region,
    upcast,
)
from .window_mass import visible_slots, window_log_sums, window_rows


@triton.jit
def window_norms_kernel(
    queries,  # [B, Q, H, D]
    query_positions,  # [B, Q]
    keys,  # [N, D]
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    lse,  # [B * G, Q * R] float32, natural
    value_norms,  # [N, R] float32
    norms,  # [N] float32
    scale,
    softcap,
    G,
    window,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Several programs per region, each on every n-th block of slots and all queries."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    for first in tl.range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        ok = t < n
        k = load_tile(keys, base + t, ok, D, DP)
        norm = tl.zeros([BLOCK_N], tl.float32)
        for r in tl.range(0, R):
            squares = tl.zeros([BLOCK_N], tl.float32)
            for q_first in tl.range(0, window, BLOCK_M):
                at_query = q_first + tl.arange(0, BLOCK_M)
                m_ok = at_query < window
                m = at_query * R + r
                index, at = window_rows(row, m, G, window, R)
                q = load_tile(queries, index, m_ok, D, DP)
                query_position = tl.load(query_positions + at, mask=m_ok, other=-1)
                total = tl.load(lse + row * (window * R) + m, mask=m_ok, other=0.0)
                logits = logits_base2(dot_keys(q, k, UPCAST), scale, softcap, SOFTCAP)
                visible = visible_slots(positions, base + t, ok, query_position, m_ok, None, row // G)
                weights = tl.where(visible, tl.exp2(logits - total[:, None] * LOG2E), 0.0)
                squares += tl.sum(weights * weights, 0)
            norm += tl.sqrt(squares) * tl.load(value_norms + (base + t) * R + r, mask=ok, other=0.0)
        tl.store(norms + base + t, norm / R, mask=ok)


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
    """Norm of what each slot adds to the output. See `headkv_mm.kernels.reference.window_norms`.

    Returns:
        [N] float32, zero outside the regions.
    """
    check_storage(keys, positions=positions)
    norms = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device)
    regions, size = start.numel(), keys.shape[-1]
    if regions == 0 or queries.numel() == 0:
        return norms
    queries, query_positions = queries.contiguous(), query_positions.contiguous()
    start, length = start.contiguous(), length.contiguous()
    window, group = queries.shape[1], queries.shape[2] // start.shape[1]
    lse = window_log_sums(
        queries, query_positions, keys, positions, start, length, scale=scale, softcap=softcap, sinks=sinks
    )
    block_n = min(64, block_slots(size, keys.dtype))
    window_norms_kernel[(regions, programs_per_region(regions, keys.shape[0], block_n))](
        queries,
        query_positions,
        keys,
        positions,
        start,
        length,
        lse,
        value_norms.float().contiguous(),
        norms,
        float(scale),
        float(softcap),
        start.shape[1],
        window=window,
        R=group,
        D=size,
        DP=padded_head_size(size),
        BLOCK_M=min(64, max(16, int(triton.next_power_of_2(window)))),
        BLOCK_N=block_n,
        SOFTCAP=softcap > 0,
        UPCAST=upcast(queries, keys),
        **OPTIONS,
    )
    return norms
