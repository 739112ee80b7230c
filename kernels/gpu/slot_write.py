# SPDX-License-Identifier: Apache-2.0
"""`slot_write`: append one entry to every region."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, check_storage, padded_head_size


@triton.jit
def slot_write_kernel(
    new_keys,  # [B, G, D]
    new_values,  # [B, G, D]
    new_positions,  # [B]
    keys,  # [N, D]
    values,  # [N, D]
    positions,  # [N]
    mass,  # [N] or None
    start,  # [B, G]
    length,  # [B, G]
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """One program per region."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    slot = tl.load(start + row).to(tl.int64) + n
    d = tl.arange(0, DP)
    k = tl.load(new_keys + row * D + d, mask=d < D, other=0.0)
    v = tl.load(new_values + row * D + d, mask=d < D, other=0.0)
    tl.store(keys + slot * D + d, k.to(keys.dtype.element_ty), mask=d < D)
    tl.store(values + slot * D + d, v.to(values.dtype.element_ty), mask=d < D)
    tl.store(positions + slot, tl.load(new_positions + row // G))
    if mass is not None:
        tl.store(mass + slot, 0.0)
    # Every thread holds its own copy of `n`: none may read it after another one has raised it.
    tl.debug_barrier()
    tl.store(length + row, n + 1)


def slot_write(
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Append one entry to every region, in place. See `headkv_mm.kernels.reference.slot_write`."""
    check_storage(keys, values=values, positions=positions, length=length, mass=mass)
    regions = start.numel()
    if regions == 0:
        return
    size = keys.shape[-1]
    slot_write_kernel[(regions,)](
        new_keys.contiguous(),
        new_values.contiguous(),
        new_positions.contiguous(),
        keys,
        values,
        positions,
        mass,
        start.contiguous(),
        length,
        start.shape[1],
        D=size,
        DP=padded_head_size(size),
        **{**OPTIONS, "num_warps": 1},  # one warp is enough for one entry
    )
