# SPDX-License-Identifier: Apache-2.0
"""`attention_behind`: how much every query attends to what lies behind its own window.

The log-sum-exps come from the first pass of `window_mass`. The second pass takes the query heads of a group together,
since weights are averaged over them before they are squared; a block of queries meets a block of slots, and only the
sum over both is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_behind import check_power
from .common import (
    LOG2E,
    block_slots,
    check_contiguous,
    check_storage,
    decode_options,
    dot_keys,
    load_tile,
    logits_base2,
    padded_head_size,
    programs_per_region,
    upcast,
)
from .window_mass import visible_slots, window_log_sums, window_rows

TILE = 32
"""Queries and slots that meet at a time. The group's mean is held beside the logits: with 64 registers spill."""


@triton.jit
def attention_behind_kernel(
    queries,  # [B, Q, H, D]
    query_positions,  # [B, Q]
    keys,  # [N, D]
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    behind,  # [B]
    first_position,  # [B] or None
    lse,  # [B * G, Q * R] float32, natural
    found,  # [B * G, blocks of queries, parts] float32
    scale,
    softcap,
    G,
    window,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POWER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Several programs per region and block of queries, each on every n-th block of slots."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    at_query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = at_query < window
    query_position = tl.load(query_positions + row // G * window + at_query, mask=m_ok, other=-1)
    newest = query_position - tl.load(behind + row // G)
    oldest = 0
    if first_position is not None:
        oldest = tl.load(first_position + row // G)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(part * BLOCK_N, n, parts * BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        ok = t < n
        k = load_tile(keys, base + t, ok, D, DP)
        share = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r in tl.range(0, R):
            m = at_query * R + r
            index, _ = window_rows(row, m, G, window, R)
            q = load_tile(queries, index, m_ok, D, DP)
            whole = tl.load(lse + row * (window * R) + m, mask=m_ok, other=0.0)
            logits = logits_base2(dot_keys(q, k, UPCAST), scale, softcap, SOFTCAP)
            visible = visible_slots(positions, base + t, ok, query_position, m_ok, None, row // G)
            share += tl.where(visible, tl.exp2(logits - whole[:, None] * LOG2E), 0.0)
        position = tl.load(positions + base + t, mask=ok, other=-1)
        counts = (position >= oldest)[None, :] & (position[None, :] <= newest[:, None])
        share = tl.where(counts & ok[None, :], share / R, 0.0)
        if POWER == 2:
            share = share * share
        total += tl.sum(share, 1)
    tl.store(found + (row * tl.num_programs(2) + tl.program_id(2)) * parts + part, tl.sum(total, 0))


def attention_behind(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    window: Tensor,
    *,
    scale: float,
    power: int = 1,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that queries give to what lies behind their windows. See `headkv_mm.kernels.reference`.

    Returns:
        [B, G] float32.
    """
    check_power(power)
    check_storage(keys, positions=positions)
    regions, size = start.numel(), keys.shape[-1]
    if regions == 0 or queries.numel() == 0:
        return torch.zeros(start.shape, dtype=torch.float32, device=keys.device)
    queries, query_positions = queries.contiguous(), query_positions.contiguous()
    start, length, window = start.contiguous(), length.contiguous(), window.contiguous()
    check_contiguous(first_position=first_position)
    storage = (queries, query_positions, keys, positions, start, length)
    lse = window_log_sums(*storage, scale=scale, softcap=softcap, sinks=sinks)
    count, group = queries.shape[1], queries.shape[2] // start.shape[1]
    block_m = min(TILE, max(16, int(triton.next_power_of_2(count))))
    block_n = min(TILE, block_slots(size, keys.dtype))
    parts, blocks = programs_per_region(regions, keys.shape[0], block_n), triton.cdiv(count, block_m)
    found = torch.empty((*start.shape, blocks * parts), dtype=torch.float32, device=keys.device)
    attention_behind_kernel[(regions, parts, blocks)](
        *storage,
        window,
        first_position,
        lse,
        found,
        float(scale),
        float(softcap),
        start.shape[1],
        window=count,
        R=group,
        D=size,
        DP=padded_head_size(size),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        POWER=power,
        SOFTCAP=softcap > 0,
        UPCAST=upcast(queries, keys),
        **decode_options(queries, keys),
    )
    real = (query_positions >= 0).sum(-1, keepdim=True).clamp(min=1)  # [B, 1]
    return (found.double().sum(-1) / real).float()
