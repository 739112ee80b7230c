# SPDX-License-Identifier: Apache-2.0
"""`window_mass`: mean attention of a window of queries per slot, without a [Q, n] matrix in memory.

Two passes over the keys. The first leaves each query's log-sum-exp over every part of the region, the second turns
logits into weights and sums them over the window. The query rows of a region are numbered m = query * R + head, heads
counted inside their group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    NEGATIVE,
    OPTIONS,
    STAGES,
    block_slots,
    check_contiguous,
    check_storage,
    dot_keys,
    load_tile,
    logits_base2,
    padded_head_size,
    programs_per_region,
    upcast,
)


@triton.jit
def window_rows(row, m, G, window, R: tl.constexpr):
    """Index of query row m of a region in [B, Q, H], and of its position in [B, Q]."""
    b = row // G
    at = b * window + m // R
    return at * (G * R) + (row % G) * R + m % R, at


@triton.jit
def visible_slots(positions, slots, ok, query_position, query_ok, first_position, b):
    """[m, n]: which slots each query sees."""
    position = tl.load(positions + slots, mask=ok, other=0)
    if first_position is not None:
        ok = ok & (position >= tl.load(first_position + b))
    return ok[None, :] & query_ok[:, None] & (position[None, :] <= query_position[:, None])


@triton.jit
def window_lse_kernel(
    queries,  # [B, Q, H, D]
    query_positions,  # [B, Q]
    keys,  # [N, D]
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    first_position,  # [B] or None
    lse,  # [B * G, parts, Q * R] float32, natural; -inf where a query sees nothing
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
    STAGES: tl.constexpr,
):
    """Several programs per region and block of queries, each on every n-th block of slots."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < window * R
    index, at = window_rows(row, m, G, window, R)
    q = load_tile(queries, index, m_ok, D, DP)
    query_position = tl.load(query_positions + at, mask=m_ok, other=-1)
    peak = tl.full([BLOCK_M], NEGATIVE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(part * BLOCK_N, n, parts * BLOCK_N, num_stages=STAGES):
        t = first + tl.arange(0, BLOCK_N)
        ok = t < n
        k = load_tile(keys, base + t, ok, D, DP)
        logits = logits_base2(dot_keys(q, k, UPCAST), scale, softcap, SOFTCAP)  # [BLOCK_M, BLOCK_N]
        visible = visible_slots(positions, base + t, ok, query_position, m_ok, first_position, row // G)
        logits = tl.where(visible, logits, NEGATIVE)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # A block may hold nothing that a query sees, so masked weights are zeroed rather than left to exp2.
        weights = tl.where(visible, tl.exp2(logits - new_peak[:, None]), 0.0)
        total = total * tl.exp2(peak - new_peak) + tl.sum(weights, 1)
        peak = new_peak
    seen = total > 0.0
    value = (peak + tl.log2(tl.where(seen, total, 1.0))) / LOG2E
    place = (row * parts + part) * (window * R) + m
    tl.store(lse + place, tl.where(seen, value, float("-inf")), mask=m_ok)


@triton.jit
def window_mass_kernel(
    queries,  # [B, Q, H, D]
    query_positions,  # [B, Q]
    keys,  # [N, D]
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    first_position,  # [B] or None
    lse,  # [B * G, Q * R] float32, natural
    mass,  # [N] float32
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
        received = tl.zeros([BLOCK_N], tl.float32)
        for m_first in tl.range(0, window * R, BLOCK_M):
            m = m_first + tl.arange(0, BLOCK_M)
            m_ok = m < window * R
            index, at = window_rows(row, m, G, window, R)
            q = load_tile(queries, index, m_ok, D, DP)
            query_position = tl.load(query_positions + at, mask=m_ok, other=-1)
            total = tl.load(lse + row * (window * R) + m, mask=m_ok, other=0.0)
            logits = logits_base2(dot_keys(q, k, UPCAST), scale, softcap, SOFTCAP)
            visible = visible_slots(positions, base + t, ok, query_position, m_ok, first_position, row // G)
            weights = tl.exp2(logits - total[:, None] * LOG2E)
            received += tl.sum(tl.where(visible, weights, 0.0), 0)
        tl.store(mass + base + t, received / (window * R), mask=ok)


def window_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean attention of a window of queries, per slot. See `headkv_mm.kernels.reference.window_mass`.

    Returns:
        [N] float32, zero outside the regions.
    """
    check_storage(keys, positions=positions)
    mass = torch.zeros(keys.shape[0], dtype=torch.float32, device=keys.device)
    regions = start.numel()
    if regions == 0 or queries.numel() == 0:
        return mass
    queries, query_positions = queries.contiguous(), query_positions.contiguous()
    start, length = start.contiguous(), length.contiguous()
    check_contiguous(first_position=first_position)
    storage = (queries, query_positions, keys, positions, start, length)
    lse = window_log_sums(*storage, scale=scale, first_position=first_position, softcap=softcap, sinks=sinks)
    shape, blocks, parts = _launch(queries, keys, start, softcap)
    numbers = (float(scale), float(softcap), start.shape[1])
    window_mass_kernel[(regions, parts)](*storage, first_position, lse, mass, *numbers, **shape, **blocks, **OPTIONS)
    return mass


def window_log_sums(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Natural log-sum-exp of each query's logits over what it sees, sinks included, [B * G, Q * R] float32.

    Tensors are contiguous; queries are numbered as in the kernels.
    """
    regions, group = start.numel(), queries.shape[2] // start.shape[1]
    shape, blocks, parts = _launch(queries, keys, start, softcap)
    window, rows = shape["window"], shape["window"] * group
    lse = torch.empty((regions, parts, rows), dtype=torch.float32, device=keys.device)
    window_lse_kernel[(regions, parts, triton.cdiv(rows, blocks["BLOCK_M"]))](
        queries,
        query_positions,
        keys,
        positions,
        start,
        length,
        first_position,
        lse,
        float(scale),
        float(softcap),
        start.shape[1],
        **shape,
        **blocks,
        STAGES=STAGES,
        **OPTIONS,
    )
    lse = lse.logsumexp(1)  # [B * G, Q * R]
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, group).expand(start.shape[0], -1, window, -1)  # [B, G, Q, R]
        lse = torch.logaddexp(lse, sink.reshape(regions, rows))
    return lse


def _launch(queries: Tensor, keys: Tensor, start: Tensor, softcap: float) -> tuple[dict[str, int], dict[str, int], int]:
    """What both kernels are told about sizes and blocks, and the programs per region."""
    window, size = queries.shape[1], keys.shape[-1]
    group = queries.shape[2] // start.shape[1]
    block_m = min(64, max(16, int(triton.next_power_of_2(window * group))))
    block_n = min(64, block_slots(size, keys.dtype))
    shape = {"window": window, "R": group, "D": size, "DP": padded_head_size(size)}
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SOFTCAP": softcap > 0, "UPCAST": upcast(queries, keys)}
    return shape, blocks, programs_per_region(start.numel(), keys.shape[0], block_n)
