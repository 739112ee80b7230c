# SPDX-License-Identifier: Apache-2.0
"""Scores by a layer's attention and the size of the values, weighted by a table of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window, mean_over_heads, window_attention
from .neighbours import pooled
from .regions import norms, to_slots

HeadWeights = tuple[tuple[float, ...], ...]
"""By compressed layer and KV head."""


@dataclass(frozen=True)
class ValueWeighted(Scorer):
    """Attention to an entry times the size of its value, the largest over the heads (arXiv 2602.08686, CompilerKV).

    For an entry t of T that a layer holds, alpha_t is T times the attention that it gets from the last `window`
    queries, averaged over them and over the layer's heads, so that its mean is 1. A head's utility is alpha_t |v_t| /
    mean |v|, and the score is the largest over the KV heads of utility times weight, the same for all heads.

    Attributes:
        window: queries; while decoding as many as there are between two evictions, at most.
        pool: neighbours in position order that share their best score, an odd number; 1 for none.
        tables: file of compiled tables; None for those that ship for the model, "identity" for none.
        head_weights: weights of one's own in place of a table's, by compressed layer and KV head.
    """

    window: int = 32
    pool: int = 1
    tables: str | None = None
    head_weights: HeadWeights | None = None

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number of neighbours, at least 1, got {self.pool}")
        if self.tables is not None and not isinstance(self.tables, str):
            raise ValueError(f"tables must be the name of a file, got {self.tables!r}")
        if self.head_weights is not None:
            object.__setattr__(self, "head_weights", checked_weights(self.head_weights))

    def for_model(self, model_or_config: Any) -> ValueWeighted:
        """The same with the weights of the tables, if it has none yet.

        Raises:
            ValueError: if there are no tables for this model, or they are of another one.
            FileNotFoundError: if there is no such file.
        """
        from ..compiled_tables import IDENTITY, compiled_tables_for

        if self.head_weights is not None or self.tables == IDENTITY:
            return self
        return replace(self, head_weights=compiled_tables_for(model_or_config, self.tables).head_weights)

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The window's; while decoding no more than there are between two evictions."""
        return min(self.window, plan.step) if decoding else self.window

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store = observed.store
        queries, positions = observed.last_queries(self.window)
        attention = mean_over_heads(window_attention(observed, queries, positions), observed)
        # That is a mean over all columns; a threshold must not depend on how many of them are padding.
        columns = positions.shape[1] / (positions >= 0).sum(-1).clamp(min=1)  # [B]
        slots, filled = store.slots_in_order()  # [B, G, M]
        alpha = attention[slots] * store.length[..., None] * columns[:, None, None]
        sizes = torch.where(filled, norms(store.values)[slots], 0.0)
        mean = sizes.sum(-1, keepdim=True) / store.length[..., None].clamp(min=1)
        utility = alpha * sizes / mean.clamp(min=torch.finfo(torch.float32).tiny)
        weighted = torch.where(filled, utility * self._weights(observed)[:, None], 0.0)
        # The largest over the heads, position by position; the last place takes what is empty.
        width = max(observed.row_seen)
        place = torch.where(filled, store.positions[slots], width).long().flatten(1)
        best = weighted.new_zeros(store.rows, width + 1).scatter_reduce(1, place, weighted.flatten(1), "amax")
        best = observed.shard.gather(best[:, None]).amax(1)
        scores = best.gather(1, place).view_as(weighted)
        return pooled(to_slots(scores, slots, filled, store), store, self.pool, "max")

    def _weights(self, observed: Observed) -> Tensor:
        """The weights of this process's heads, [G] float32.

        Raises:
            ValueError: without tables, or for those of a model of another shape.
        """
        from ..compiled_tables import IDENTITY

        place, heads, own = observed.plan.place, observed.heads, observed.store.kv_heads
        if self.head_weights is None:
            if self.tables != IDENTITY:
                raise ValueError("this scorer has no weights; a HeadKVCache takes them from the model's tables")
            return torch.ones(own, device=observed.seen.device)
        if (len(self.head_weights), len(self.head_weights[0])) != (place.count, heads):
            raise ValueError(
                f"the weights are of {len(self.head_weights)} layers with {len(self.head_weights[0])} KV heads, and "
                f"the model has {place.count} layers with {heads}"
            )
        first = observed.shard.rank * own
        return torch.tensor(self.head_weights[place.index][first : first + own], device=observed.seen.device)


def checked_weights(weights: Sequence[Sequence[float]]) -> HeadWeights:
    """Weights by layer and head.

    Raises:
        ValueError: if they are not positive numbers, the same number of them in every layer.
    """
    listed = isinstance(weights, Sequence) and bool(weights)
    if not listed or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in weights):
        raise ValueError("head weights must be a list of numbers for every layer")
    numbers = [weight for row in weights for weight in row]
    if not numbers or not all(isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in numbers):
        raise ValueError("head weights must be numbers")
    if not all(math.isfinite(weight) and weight > 0 for weight in numbers):
        raise ValueError("head weights must be positive")
    if len({len(row) for row in weights}) > 1:
        raise ValueError("every layer must have the same number of head weights")
    return tuple(tuple(float(weight) for weight in row) for row in weights)
