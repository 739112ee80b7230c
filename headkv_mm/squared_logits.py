# SPDX-License-Identifier: Apache-2.0
"""Squared logits of several queries at once: what a chunk adds to the slots where decoding adds them one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import RaggedKV
from .scorers.regions import blocks, entries, region_slots, to_slots

_BLOCK_ELEMENTS = 1 << 22


def squared_logits(queries: Tensor, query_positions: Tensor, store: RaggedKV, *, scale: float) -> Tensor:
    """The sum of `(scale * q.k)^2` over the queries that see a slot, and over the group, as [N] float32.

    Args:
        queries: [B, Q, H, D].
        query_positions: [B, Q] int32, -1 for padding. A query sees what lies at its position or before.
        store: the layer's storage.
        scale: multiplies q.k.
    """
    slots, filled = region_slots(store)  # [B, G, M]
    batch, count, heads, _ = queries.shape
    asking = torch.where((query_positions >= 0)[..., None, None], queries, 0).float() * scale
    asking = asking.unflatten(2, (store.kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, R * Q, D]
    group = heads // store.kv_heads
    sums = torch.zeros(slots.shape, device=slots.device)
    for block in blocks(slots.shape[-1], max(_BLOCK_ELEMENTS // max(batch * count * heads, 1), 16)):
        keys = entries(store.keys, slots[..., block], filled[..., block], torch.float32)  # [B, G, m, D]
        squares = (asking @ keys.mT).square_().unflatten(2, (group, count)).sum(2)  # [B, G, Q, m]
        positions = store.positions[slots[..., block]]
        sees = positions[:, :, None] <= query_positions[:, None, :, None]  # [B, G, Q, m]
        sums[..., block] = torch.where(sees, squares, 0.0).sum(2)
    return to_slots(sums, slots, filled, store)
