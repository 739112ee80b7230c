# SPDX-License-Identifier: Apache-2.0
"""What every kernel computes, in plain torch: the contract that the fast backends are tested against.

All functions work on the storage of `headkv_mm.ragged.RaggedKV`. B rows, G KV heads, R query heads per KV head,
H = G * R query heads, D head size, N slots:

    keys, values  [N, D]  model dtype   one slot per entry
    positions     [N]     int32         position of the entry in its row, -1 = empty
    start         [B, G]  int32         first slot of the region of (row, head)
    length        [B, G]  int32         filled slots; `start .. start + length` is packed, in any order
    mass          [N]     float32       optional running attention per slot, or another sum of what queries gave it

Regions never overlap, and nothing outside a filled region is ever read. The loops here are meant to be read, and to be
exact in whatever dtype comes in (float64 included); speed is the business of `cpu` (numba) and `gpu` (Triton). What
measures attention without changing anything is in `reference_scores` and `reference_behind`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mass_kinds import MassOf, adds_squares
from .reference_behind import attention_behind
from .reference_scores import (
    accumulation_dtype,
    capped,
    head_mass,
    mean_query_logits,
    regions,
    tokens_needed,
    window_mass,
    window_norms,
    window_scores,
)

__all__ = [
    "STRATA_UNITS",
    "append_decode",
    "attention_behind",
    "fill_holes",
    "gather_regions",
    "head_mass",
    "mean_query_logits",
    "ragged_decode",
    "slot_write",
    "stratified_victims",
    "tokens_needed",
    "window_mass",
    "window_norms",
    "window_scores",
]

STRATA_UNITS = 1024
"""The strata ratio is rounded to 1/1024, so that every backend cuts at the same entry."""


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
    """Append one entry to every region, in place.

    Args:
        new_keys: [B, G, D] keys after rotation.
        new_values: [B, G, D].
        new_positions: [B] int32, the position of the new token in its row.
        keys, values, positions, start, length: the storage; `length` grows by one.
        mass: [N] float32; the new slot starts at zero.

    The caller guarantees a free slot in every region (capacities are known on the host, so nothing is checked here).
    """
    slots = (start + length).long()  # [B, G]
    keys[slots] = new_keys.to(keys.dtype)
    values[slots] = new_values.to(values.dtype)
    positions[slots] = new_positions[:, None].expand_as(slots).to(positions.dtype)
    if mass is not None:
        mass[slots] = 0.0
    length += 1


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
    """Attention of one query token per row over its regions.

    Args:
        query: [B, H, D], head h reads KV head h // R.
        scale: multiplies q.k.
        max_length: an upper bound of `length` known on the host; lets a launcher size its grid without asking the
            device. None: read it from `length`.
        softcap: if > 0, logits become `softcap * tanh(logit / softcap)`.
        sinks: [H], one extra logit per query head that takes part in the softmax and has no value.
        mass: [N] float32; what `mass_of` names is added to it, slot by slot, summed over the group's query heads.
        mass_of: "attention": the softmax weight. "squared_logits": `(scale * q.k)^2`, before any softcap.

    Returns:
        [B, H, D] in the query's dtype; zeros where a region is empty.
    """
    del max_length
    squares, heads = adds_squares(mass_of), query.shape[1]
    group = heads // start.shape[1]
    dtype = accumulation_dtype(query.dtype)
    out = torch.zeros_like(query)
    for b, g, slots in regions(start, length):
        h = slice(g * group, (g + 1) * group)
        plain = query[b, h].to(dtype) @ keys[slots].to(dtype).T * scale  # [R, n]
        logits = capped(plain, softcap)
        if sinks is None:
            weights = logits.softmax(-1)
        else:
            weights = torch.cat([logits, sinks[h, None].to(dtype)], -1).softmax(-1)[:, :-1]
        out[b, h] = (weights @ values[slots].to(dtype)).to(out.dtype)
        if mass is not None:
            mass[slots] += (plain.square() if squares else weights).sum(0).to(mass.dtype)
    return out


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
    """`slot_write`, then `ragged_decode` over the region with the new entry in it: one decode step of one layer.

    `max_length` bounds the length after the write. Shapes as in the two functions.
    """
    slot_write(new_keys, new_values, new_positions, keys, values, positions, start, length, mass)
    return ragged_decode(
        query,
        keys,
        values,
        start,
        length,
        scale=scale,
        max_length=max_length,
        softcap=softcap,
        sinks=sinks,
        mass=mass,
        mass_of=mass_of,
    )


def stratified_victims(
    scores: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    evict: Tensor,
    strata_ratio: float,
) -> Tensor:
    """Choose what leaves each region: stratified token eviction (arXiv 2605.20600).

    Candidates are the T entries with `first <= position < last`; everything else is protected. Sorted by position, the
    oldest `strata_ratio` of them form the long stratum (counted in 1/`STRATA_UNITS`, rounded down), the others the near
    one. Of M = min(evict, T) victims `M - M // 2` come from near and the rest from long, each stratum giving its lowest
    scores; what one stratum cannot give, the other does. `strata_ratio = 0` is plain lowest-score eviction. Equal
    scores: the older entry leaves.

    Args:
        scores: [N], higher stays.
        first, last: [B, G] int32, bounds of the evictable positions.
        evict: [B, G] int32, how many entries should leave (at most T do; negative counts as zero).
        strata_ratio: 0 <= ratio <= 1.

    Returns:
        [N] bool, True for the victims.
    """
    victims = torch.zeros(positions.shape[0], dtype=torch.bool, device=positions.device)
    for b, g, slots in regions(start, length):
        position = positions[slots]
        candidate = ((position >= first[b, g]) & (position < last[b, g])).nonzero()[:, 0]
        candidate = candidate[position[candidate].argsort()]  # oldest first
        total = len(candidate)
        count = min(max(int(evict[b, g]), 0), total)
        n_long = total * round(strata_ratio * STRATA_UNITS) // STRATA_UNITS
        n_near = total - n_long
        from_near = min(count - count // 2, n_near)
        from_long = min(count - from_near, n_long)
        from_near = count - from_long
        for stratum, k in ((candidate[:n_long], from_long), (candidate[n_long:], from_near)):
            # A stable sort of entries in position order puts the older of two equals first.
            lowest = scores[slots][stratum].argsort(stable=True)[:k]
            victims[slots.start + stratum[lowest]] = True
    return victims


def fill_holes(
    victims: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Remove the victims, in place, and keep every region packed.

    Holes inside the new length are filled, in slot order, with the survivors that lie beyond it, also in slot order: at
    most as many entries move as leave. Freed slots get position -1. `length` shrinks by the number of victims.
    """
    for b, g, slots in regions(start, length):
        flags = victims[slots]
        kept = int((~flags).sum())
        holes = flags[:kept].nonzero()[:, 0] + slots.start
        movers = (~flags[kept:]).nonzero()[:, 0] + slots.start + kept
        for tensor in (keys, values, positions, mass):
            if tensor is not None:
                tensor[holes] = tensor[movers]
        positions[slots.start + kept : slots.stop] = -1
        length[b, g] = kept


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
    """Copy kept entries into new regions: grouping, prefill selection, growth, and reordering of rows.

    Args:
        rows: [B'] int64, the old row that each new row takes.
        keep: [N] bool, or None for everything.
        new_keys, new_values: [N', D]; new_positions: [N'] int32; new_start, new_length: [B', G] int32. Written in
            place: entries keep their slot order, the rest of `new_positions` is left as it is (callers pass -1).
        mass, new_mass: copied along when both are given.
    """
    starts, lengths, new_starts = start.tolist(), length.tolist(), new_start.tolist()
    for b, old in enumerate(rows.tolist()):
        for g in range(start.shape[1]):
            slots = torch.arange(starts[old][g], starts[old][g] + lengths[old][g], device=keys.device)
            if keep is not None:
                slots = slots[keep[slots]]
            target = slice(new_starts[b][g], new_starts[b][g] + len(slots))
            new_keys[target] = keys[slots]
            new_values[target] = values[slots]
            new_positions[target] = positions[slots]
            if mass is not None and new_mass is not None:
                new_mass[target] = mass[slots]
            new_length[b, g] = len(slots)
