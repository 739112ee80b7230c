# SPDX-License-Identifier: Apache-2.0
"""Moving a storage into other regions with less memory on top: keys first, and values when the old keys are gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .ragged import RaggedKV


def regroup_in_turn(
    store: RaggedKV, capacity: Tensor, row_slots: Sequence[int], *, max_length: int, keep: Tensor | None = None
) -> tuple[RaggedKV, int]:
    """What `RaggedKV.regroup` gives, from a storage that nobody needs any more: its keys and values are gone then.

    Args:
        store: it owns its tensors, and no selector remembers anything of its entries.
        capacity: [B, G] int32, slots of every new region.
        row_slots: its row sums.
        max_length: bound of the new lengths.
        keep: [N] bool, None for everything.

    Returns:
        The new storage, and the most bytes that were there meanwhile beyond those of the new storage.
    """
    rows = torch.arange(store.rows, device=store.start.device)
    whole, with_mass = store.nbytes, store.mass is not None
    new = RaggedKV.empty(capacity, row_slots, 0, dtype=store.keys.dtype, max_length=max_length, with_mass=with_mass)
    new.ordered = store.ordered

    def moved(old: Tensor) -> Tensor:
        # The kernel moves two tensors at once; here they are the same one.
        target = old.new_empty(sum(row_slots), old.shape[-1])
        places = (new.positions, new.start, new.length)
        kernels.gather_regions(
            rows,
            keep,
            old,
            old,
            store.positions,
            store.start,
            store.length,
            target,
            target,
            *places,
            store.mass,
            new.mass,
        )
        return target

    nothing = store.keys.new_empty(0, store.keys.shape[-1])
    half = store.keys.nbytes
    new.keys, store.keys = moved(store.keys), nothing
    new.values, store.values = moved(store.values), nothing
    # First the old storage and the new keys, then the old values and the new storage.
    return new, whole - min(half, new.values.nbytes)
