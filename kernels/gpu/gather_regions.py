# SPDX-License-Identifier: Apache-2.0
"""`gather_regions`: copy kept entries into new regions, in slot order.

With a `keep` mask, one program per new region first lists the kept slots by a running prefix count. The copy itself is
spread over many programs per region.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    OPTIONS,
    check_contiguous,
    check_storage,
    load_tile,
    padded_head_size,
    programs_per_region,
    store_tile,
)

_BLOCK = 1024
_COPIES = 32


@triton.jit
def list_kept_kernel(
    rows,  # [B'] int64
    keep,  # [N] uint8
    start,  # [B, G]
    length,  # [B, G]
    new_start,  # [B', G]
    new_length,  # [B', G]
    sources,  # [N'] int32; the list of a region begins at its first new slot
    G,
    BLOCK: tl.constexpr,
):
    """One program per new region: the kept slots in slot order, and their number."""
    new_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + new_row // G) * G + new_row % G
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    new_base = tl.load(new_start + new_row).to(tl.int64)
    kept = 0
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        stays = (tl.load(keep + base + t, mask=t < n, other=0) != 0).to(tl.int32)
        tl.store(sources + new_base + kept + tl.cumsum(stays, 0) - 1, (base + t).to(tl.int32), mask=stays != 0)
        kept += tl.sum(stays, 0)
    tl.store(new_length + new_row, kept)


@triton.jit
def copy_kernel(
    rows,  # [B'] int64
    sources,  # [N'] int32, or None to copy whole regions
    keys,  # [N, D]
    values,  # [N, D]
    positions,  # [N]
    mass,  # [N] or None
    start,  # [B, G]
    length,  # [B, G]
    new_keys,  # [N', D]
    new_values,  # [N', D]
    new_positions,  # [N']
    new_mass,  # [N'] or None
    new_start,  # [B', G]
    new_length,  # [B', G]
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Several programs per new region."""
    new_row = tl.program_id(0).to(tl.int64)
    new_base = tl.load(new_start + new_row).to(tl.int64)
    row = tl.load(rows + new_row // G) * G + new_row % G
    base = tl.load(start + row).to(tl.int64)
    if sources is None:
        count = tl.load(length + row)
        if tl.program_id(1) == 0:
            tl.store(new_length + new_row, count)
    else:
        count = tl.load(new_length + new_row)
    for first in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        ok = i < count
        if sources is None:
            source = base + i
        else:
            source = tl.load(sources + new_base + i, mask=ok, other=0).to(tl.int64)
        target = new_base + i
        store_tile(new_keys, target, ok, load_tile(keys, source, ok, D, DP), D, DP)
        store_tile(new_values, target, ok, load_tile(values, source, ok, D, DP), D, DP)
        tl.store(new_positions + target, tl.load(positions + source, mask=ok, other=-1), mask=ok)
        if mass is not None:
            tl.store(new_mass + target, tl.load(mass + source, mask=ok, other=0.0), mask=ok)


def gather_regions(
    rows: Tensor,
    keep: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    new_start: Tensor,
    new_length: Tensor,
    mass: Tensor | None = None,
    new_mass: Tensor | None = None,
) -> None:
    """Copy kept entries into new regions, in place. See `headkv_mm.kernels.reference.gather_regions`.

    The new storage must not overlap the old one. `new_length` may be `length` itself.
    """
    check_storage(keys, values=values, positions=positions, keep=keep, mass=mass)
    check_storage(
        new_keys, new_values=new_values, new_positions=new_positions, new_length=new_length, new_mass=new_mass
    )
    regions = new_start.numel()
    if regions == 0:
        return
    if mass is None or new_mass is None:
        mass = new_mass = None
    length = length.clone() if new_length is length else length.contiguous()
    rows, start, new_start = rows.contiguous(), start.contiguous(), new_start.contiguous()
    groups, size = start.shape[1], keys.shape[-1]
    sources = None
    if keep is not None:
        check_contiguous(keep=keep)
        sources = torch.empty(new_keys.shape[0], dtype=torch.int32, device=keys.device)
        list_kept_kernel[(regions,)](
            rows,
            keep.view(torch.uint8),
            start,
            length,
            new_start,
            new_length,
            sources,
            groups,
            BLOCK=_BLOCK,
            **OPTIONS,
        )
    copy_kernel[(regions, programs_per_region(regions, new_keys.shape[0], _COPIES))](
        rows,
        sources,
        keys,
        values,
        positions,
        mass,
        start,
        length,
        new_keys,
        new_values,
        new_positions,
        new_mass,
        new_start,
        new_length,
        groups,
        D=size,
        DP=padded_head_size(size),
        BLOCK=_COPIES,
        **OPTIONS,
    )
