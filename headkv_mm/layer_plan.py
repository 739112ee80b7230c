# SPDX-License-Identifier: Apache-2.0
"""The plan of one layer, from what the user asked for: budgets in bytes are divided once the batch is known."""

from __future__ import annotations

from torch import Tensor

from .budgets import Budget, StorageCost, image_plan
from .image_grid import ImageGrid
from .memory import storage_cost
from .plan import LayerPlace, Plan
from .registry import Pieces
from .text_plan import TextPlan, text_plan


def layer_plan(
    pieces: Pieces, budget: Budget, grid: ImageGrid | None, place: LayerPlace, cost: StorageCost | None = None
) -> Plan:
    """How many entries a head keeps, and when.

    Args:
        pieces: of the method.
        budget: see `headkv_mm.budgets`.
        grid: where the image lies; None for a text.
        place: the layer.
        cost: what entries cost; needed for a budget in bytes only.

    Raises:
        ValueError: if the budget is too small.
    """
    return text_layer_plan(pieces, budget, place, cost) if grid is None else image_plan(budget, grid, cost, place)


def text_layer_plan(pieces: Pieces, budget: Budget, place: LayerPlace, cost: StorageCost | None = None) -> TextPlan:
    """The same for a text."""
    return text_plan(
        budget,
        interval=getattr(pieces.schedule, "interval", None),
        sinks=getattr(pieces.selector, "sinks", 0),
        place=place,
        cost=cost,
    )


def layer_cost(
    pieces: Pieces, grid: ImageGrid | None, place: LayerPlace, keys: Tensor, query_heads: int, longest: int
) -> StorageCost:
    """What entries cost, in all layers and processes together: that is what a budget in bytes is given for.

    Args:
        pieces, grid, place: see `layer_plan`.
        keys: [B, G, T, D] of the prompt.
        query_heads: H of this process.
        longest: real prompt tokens of the longest row.
    """
    size = place.shard.size
    return storage_cost(
        pieces,
        layers=place.count,
        rows=keys.shape[0],
        heads=query_heads * size,
        kv_heads=keys.shape[1] * size,
        head_dim=keys.shape[-1],
        itemsize=keys.element_size(),
        condition=0 if grid is None else longest + grid.start,
        allocations=2 if grid is None else 1,
    )
