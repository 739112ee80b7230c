# SPDX-License-Identifier: Apache-2.0
"""`fill_holes`: remove victims and keep regions packed, moving at most as many entries as leave.

One program per region ranks the holes below the new length and the survivors beyond it, in slot order, and lists both.
A second kernel moves entry i of one list to entry i of the other: holes lie below the new length and survivors beyond
it, so programs never touch each other's slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, check_storage, load_tile, padded_head_size, programs_per_region, store_tile

_BLOCK = 1024
_MOVES = 32


@triton.jit
def list_moves_kernel(
    victims,  # [N] uint8
    positions,  # [N]
    start,  # [B, G]
    length,  # [B, G]
    sources,  # [N] int32; the list of a region begins at its first slot
    targets,  # [N] int32, likewise
    moves,  # [B * G] int32
    BLOCK: tl.constexpr,
):
    """One program per region: what moves where, freed positions, and the new length."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(length + row)
    base = tl.load(start + row).to(tl.int64)
    kept = 0
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        kept += tl.sum((tl.load(victims + base + t, mask=t < n, other=1) == 0).to(tl.int32), 0)
    holes = 0
    movers = 0
    for first in tl.range(0, n, BLOCK):
        t = first + tl.arange(0, BLOCK)
        ok = t < n
        leaves = tl.load(victims + base + t, mask=ok, other=0) != 0
        hole = (ok & leaves & (t < kept)).to(tl.int32)
        mover = (ok & (leaves == 0) & (t >= kept)).to(tl.int32)
        slot = (base + t).to(tl.int32)
        tl.store(targets + base + holes + tl.cumsum(hole, 0) - 1, slot, mask=hole != 0)
        tl.store(sources + base + movers + tl.cumsum(mover, 0) - 1, slot, mask=mover != 0)
        tl.store(positions + base + t, -1, mask=ok & leaves & (t >= kept))
        holes += tl.sum(hole, 0)
        movers += tl.sum(mover, 0)
    tl.store(moves + row, movers)
    # Every thread holds its own copy of `n`: none may read it after another one has changed it.
    tl.debug_barrier()
    tl.store(length + row, kept)


@triton.jit
def move_kernel(
    sources,  # [N] int32
    targets,  # [N] int32
    moves,  # [B * G] int32
    keys,  # [N, D]
    values,  # [N, D]
    positions,  # [N]
    mass,  # [N] or None
    start,  # [B, G]
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Several programs per region: entry i of the sources to entry i of the targets."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(moves + row)
    base = tl.load(start + row).to(tl.int64)
    for first in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        ok = i < count
        source = tl.load(sources + base + i, mask=ok, other=0).to(tl.int64)
        target = tl.load(targets + base + i, mask=ok, other=0).to(tl.int64)
        store_tile(keys, target, ok, load_tile(keys, source, ok, D, DP), D, DP)
        store_tile(values, target, ok, load_tile(values, source, ok, D, DP), D, DP)
        if mass is not None:
            tl.store(mass + target, tl.load(mass + source, mask=ok, other=0.0), mask=ok)
        tl.store(positions + target, tl.load(positions + source, mask=ok, other=-1), mask=ok)
        tl.debug_barrier()  # all have read their position before any is cleared
        tl.store(positions + source, -1, mask=ok)


def fill_holes(
    victims: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Remove the victims, in place, and keep every region packed. See `headkv_mm.kernels.reference.fill_holes`."""
    check_storage(keys, victims=victims, values=values, positions=positions, length=length, mass=mass)
    regions, slots = start.numel(), positions.shape[0]
    if regions == 0:
        return
    start = start.contiguous()
    sources = torch.empty(slots, dtype=torch.int32, device=keys.device)
    targets = torch.empty(slots, dtype=torch.int32, device=keys.device)
    moves = torch.empty(regions, dtype=torch.int32, device=keys.device)
    list_moves_kernel[(regions,)](
        victims.view(torch.uint8), positions, start, length, sources, targets, moves, BLOCK=_BLOCK, **OPTIONS
    )
    size = keys.shape[-1]
    move_kernel[(regions, programs_per_region(regions, slots, _MOVES))](
        sources,
        targets,
        moves,
        keys,
        values,
        positions,
        mass,
        start,
        D=size,
        DP=padded_head_size(size),
        BLOCK=_MOVES,
        **OPTIONS,
    )
