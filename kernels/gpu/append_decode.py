# SPDX-License-Identifier: Apache-2.0
"""`append_decode`: write the new entry of every region and attend to the whole region, one launch if it is short."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..mass_kinds import MassOf, adds_squares
from .common import (
    CHUNK,
    STAGES,
    attend,
    block_slots,
    check_storage,
    decode_options,
    initial_state,
    load_tile,
    logits_base2,
    longest,
    padded_group,
    padded_head_size,
    store_tile,
    upcast,
)
from .decode_mass import add_decode_mass
from .ragged_decode import ragged_decode
from .slot_write import slot_write


@triton.jit
def append_decode_kernel(
    query,  # [B, H, D]
    new_keys,  # [B, G, D]
    new_values,  # [B, G, D]
    new_positions,  # [B]
    keys,  # [N, D]
    values,  # [N, D]
    positions,  # [N]
    mass,  # [N] or None
    start,  # [B, G]
    length,  # [B, G]
    sinks,  # [H] or None
    out,  # [B, H, D]
    lse,  # [B, H] float32 in base 2, or None
    squares,  # [N] or None: `mass` if squared logits are added to it
    scale,
    softcap,
    G,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per region: slot write and attention of the region, new entry included."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    slot = base + n
    r = tl.arange(0, RP)
    d = tl.arange(0, DP)
    q = load_tile(query, row * R + r, r < R, D, DP)
    # Rounded to the storage dtype, as a reader of the written slot would see them.
    k_new = tl.load(new_keys + row * D + d, mask=d < D, other=0.0).to(keys.dtype.element_ty)
    v_new = tl.load(new_values + row * D + d, mask=d < D, other=0.0).to(values.dtype.element_ty)
    tl.store(keys + slot * D + d, k_new, mask=d < D)
    tl.store(values + slot * D + d, v_new, mask=d < D)
    tl.store(positions + slot, tl.load(new_positions + row // G))
    if mass is not None and squares is None:
        tl.store(mass + slot, 0.0)
    # The new entry enters the softmax from registers and the loop reads only old slots: nothing waits for the store.
    peak, total, acc = initial_state(sinks, row, G, R, RP, DP)
    raw = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    if squares is not None:
        tl.store(squares + slot, tl.sum(raw * raw, 0) * (scale * scale))
    logits = logits_base2(raw, scale, softcap, SOFTCAP)  # [RP]
    new_peak = tl.maximum(peak, logits)
    weights = tl.exp2(logits - new_peak)
    total = total * tl.exp2(peak - new_peak) + weights
    acc = acc + weights[:, None] * v_new.to(tl.float32)[None, :]  # acc was zero: a sink has no value
    peak, total, acc = attend(
        q, keys, values, base, 0, n, new_peak, total, acc, squares,
        scale, softcap, D, DP, BLOCK_N, SOFTCAP, UPCAST, STAGES,
    )  # fmt: skip
    store_tile(out, row * R + r, r < R, acc / total[:, None], D, DP)
    if lse is not None:
        tl.store(lse + row * R + r, peak + tl.log2(total), mask=r < R)
    # Every thread holds its own copy of `n`: none may read it after another one has raised it.
    tl.debug_barrier()
    tl.store(length + row, n + 1)


def append_decode(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
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
    """One decode step of one layer: append, then attend. See `headkv_mm.kernels.reference.append_decode`.

    Returns:
        [B, H, D] in the query's dtype.
    """
    check_storage(keys, values=values, positions=positions, length=length, mass=mass)
    bound = longest(length, max_length, extra=1)
    if start.numel() == 0 or bound > CHUNK:
        slot_write(new_keys, new_values, new_positions, keys, values, positions, start, length, mass)
        return ragged_decode(
            query,
            keys,
            values,
            start,
            length,
            scale=scale,
            max_length=bound,
            softcap=softcap,
            sinks=sinks,
            mass=mass,
            mass_of=mass_of,
        )
    query, start = query.contiguous(), start.contiguous()
    size = keys.shape[-1]
    group = query.shape[1] // start.shape[1]
    out = torch.empty_like(query)
    squares = mass if adds_squares(mass_of) else None
    weighs = mass is not None and squares is None
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if weighs else None
    append_decode_kernel[(start.numel(),)](
        query,
        new_keys.contiguous(),
        new_values.contiguous(),
        new_positions.contiguous(),
        keys,
        values,
        positions,
        mass,
        start,
        length,
        sinks,
        out,
        lse,
        squares,
        float(scale),
        float(softcap),
        start.shape[1],
        R=group,
        RP=padded_group(group),
        D=size,
        DP=padded_head_size(size),
        BLOCK_N=block_slots(size, keys.dtype, squares=squares is not None),
        SOFTCAP=softcap > 0,
        UPCAST=upcast(query, keys),
        STAGES=STAGES,
        **decode_options(query, keys),
    )
    if mass is not None and lse is not None:
        add_decode_mass(query, keys, start, length, lse, mass, scale=scale, softcap=softcap, max_length=bound)
    return out
