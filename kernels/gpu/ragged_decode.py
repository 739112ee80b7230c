# SPDX-License-Identifier: Apache-2.0
"""`ragged_decode`: attention of one query token per row over regions of any length.

Regions of up to `CHUNK` slots: one program per region writes the output. Longer bounds: one program per region and
chunk leaves a normalised partial output and its log-sum-exp, programs past the end of their region stop at once, and a
second kernel combines. The result of a region does not depend on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..mass_kinds import MassOf, adds_squares
from .common import (
    CHUNK,
    OPTIONS,
    STAGES,
    attend,
    block_slots,
    check_storage,
    decode_options,
    initial_state,
    load_tile,
    longest,
    padded_group,
    padded_head_size,
    store_tile,
    upcast,
)
from .decode_mass import add_decode_mass


@triton.jit
def decode_kernel(
    query,  # [B, H, D]
    keys,  # [N, D]
    values,  # [N, D]
    start,  # [B, G]
    length,  # [B, G]
    sinks,  # [H] or None
    out,  # [B * G, chunks, R, D]; one chunk: the result itself
    lse,  # [B * G, chunks, R] float32 in base 2, or None
    squares,  # [N] float32 that squared logits are added to, or None
    scale,
    softcap,
    G,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per region and chunk: a partial output with its log-sum-exp, or the output if there is one chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    n = tl.load(length + row)
    lo = chunk * CHUNK
    hi = n
    if SPLIT:
        if lo >= n:
            return
        hi = tl.minimum(n, lo + CHUNK)
    r = tl.arange(0, RP)
    q = load_tile(query, row * R + r, r < R, D, DP)
    # The sink belongs to the whole region, so a split leaves it to the combine kernel.
    peak, total, acc = initial_state(None if SPLIT else sinks, row, G, R, RP, DP)
    base = tl.load(start + row).to(tl.int64)
    peak, total, acc = attend(
        q, keys, values, base, lo, hi, peak, total, acc, squares,
        scale, softcap, D, DP, BLOCK_N, SOFTCAP, UPCAST, STAGES,
    )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # an empty region gives zeros
    place = (row * tl.num_programs(1) + chunk) * R + r
    store_tile(out, place, r < R, result, D, DP)
    if lse is not None:
        tl.store(lse + place, peak + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=r < R)


@triton.jit
def combine_kernel(
    part_out,  # [B * G, chunks, R, D] float32
    part_lse,  # [B * G, chunks, R] float32, base 2
    length,  # [B, G]
    sinks,  # [H] or None
    out,  # [B, H, D]
    lse,  # [B, H] float32, base 2, or None
    chunks,
    G,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per region: the weighted mean of its partial outputs."""
    row = tl.program_id(0).to(tl.int64)
    used = (tl.load(length + row) + CHUNK - 1) // CHUNK
    r = tl.arange(0, RP)
    peak, total, acc = initial_state(sinks, row, G, R, RP, DP)
    for chunk in tl.range(0, used):
        place = (row * chunks + chunk) * R + r
        part = tl.load(part_lse + place, mask=r < R, other=0.0)
        new_peak = tl.maximum(peak, part)
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(part - new_peak)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * load_tile(part_out, place, r < R, D, DP)
        peak = new_peak
    store_tile(out, row * R + r, r < R, acc / tl.where(total > 0.0, total, 1.0)[:, None], D, DP)
    if lse is not None:
        tl.store(lse + row * R + r, peak + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=r < R)


def ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mass: Tensor | None = None,
    mass_of: MassOf = "attention",
) -> Tensor:
    """Attention of one query token per row over its regions. See `headkv_mm.kernels.reference.ragged_decode`.

    Returns:
        [B, H, D] in the query's dtype; zeros where a region is empty.
    """
    check_storage(keys, values=values, mass=mass)
    query, start, length = query.contiguous(), start.contiguous(), length.contiguous()
    regions, size = start.numel(), keys.shape[-1]
    bound = longest(length, max_length)
    if regions == 0 or bound == 0:
        return torch.zeros_like(query)
    out = torch.empty_like(query)
    group = query.shape[1] // start.shape[1]
    chunks = triton.cdiv(bound, CHUNK)
    shape = {"R": group, "D": size, "DP": padded_head_size(size), "CHUNK": CHUNK}
    squares = mass if adds_squares(mass_of) else None
    weighs = mass is not None and squares is None
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if weighs else None
    part_out, part_lse = out, lse
    if chunks > 1:
        part_out = torch.empty((regions, chunks, group, size), dtype=torch.float32, device=query.device)
        part_lse = torch.empty((regions, chunks, group), dtype=torch.float32, device=query.device)
    decode_kernel[(regions, chunks)](
        query,
        keys,
        values,
        start,
        length,
        sinks,
        part_out,
        part_lse,
        squares,
        float(scale),
        float(softcap),
        start.shape[1],
        **shape,
        RP=padded_group(group),
        BLOCK_N=block_slots(size, keys.dtype, squares=squares is not None),
        SPLIT=chunks > 1,
        SOFTCAP=softcap > 0,
        UPCAST=upcast(query, keys),
        STAGES=STAGES,
        **decode_options(query, keys),
    )
    if chunks > 1:
        combine_kernel[(regions,)](
            part_out,
            part_lse,
            length,
            sinks,
            out,
            lse,
            chunks,
            start.shape[1],
            **shape,
            RP=int(triton.next_power_of_2(group)),
            **OPTIONS,
        )
    if mass is not None and lse is not None:
        add_decode_mass(query, keys, start, length, lse, mass, scale=scale, softcap=softcap, max_length=bound)
    return out
