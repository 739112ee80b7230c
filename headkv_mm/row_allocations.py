# SPDX-License-Identifier: Apache-2.0
"""The allocations of the rows of a text's layer as one, for the heads that this process has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .compressor import tensor_fields
from .decided import Decided
from .pieces import Allocation
from .tensor_parallel import HeadShard


def joined(
    decided: Sequence[Decided | None],
    budgets: Sequence[int],
    *,
    shard: HeadShard,
    kv_heads: int,
    device: torch.device,
) -> Allocation:
    """All rows, each grown to its budget; rows within their budget keep everything.

    Args:
        decided: by row; None within the budget.
        budgets: by row, entries per KV head after the first ones, on the average.
        shard: the heads of this process.
        kv_heads: how many these are.
        device: of the layer.
    """
    rows = []
    for one, budget in zip(decided, budgets, strict=True):
        if one is None:
            keep = torch.full((1, kv_heads), budget, dtype=torch.int32, device=device)
            rows.append(Allocation(keep, keep, [budget * kv_heads], budget))
        else:
            rows.append(_own(one.grown(budget), shard, kv_heads, device))
    local = [row.local for row in rows if row.local is not None]
    return Allocation(
        targets=torch.cat([row.targets for row in rows]),
        windows=torch.cat([row.windows for row in rows]),
        row_totals=[row.row_totals[0] for row in rows],
        largest=max(row.largest for row in rows),
        local=torch.cat(local) if len(local) == len(rows) else None,
    )


def _own(allocation: Allocation, shard: HeadShard, kv_heads: int, device: torch.device) -> Allocation:
    """The part of this process's heads, on the layer's device."""
    if shard.size == 1:
        return allocation
    own = shard.own(allocation, kv_heads)
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensor_fields(own).items()}
    return replace(own, **moved)
