# SPDX-License-Identifier: Apache-2.0
"""Scores from attention: what the newest queries looked at, or what all queries together did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..pieces import Observed, Scorer
from ..plan import Plan
from .neighbours import pooled

_ALL = 1 << 62


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Attention of the last queries, averaged over them and the group, pooled over neighbours (arXiv 2404.14469).

    At the end of a prompt (or of a chunk) the last `window` queries are looked at again; while decoding the attention
    of the last `window` queries before an eviction is added up as it is computed.

    Attributes:
        window: queries.
        pool: neighbours in position order that share their score, an odd number; 1 for none.
        pooling: "max" or "mean" of the neighbours.
    """

    window: int = 32
    pool: int = 7
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number of neighbours, at least 1, got {self.pool}")
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling must be 'max' or 'mean', got {self.pooling!r}")

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The window's of the prompt; none while decoding."""
        return 0 if decoding else self.window

    def attention_window(self, plan: Plan) -> int:
        """The window, as far as it fits between two evictions."""
        return min(self.window, plan.step)

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        if observed.added_up is not None:
            return pooled(observed.added_up, observed.store, self.pool, self.pooling)
        queries, positions = observed.last_queries(self.window)
        store = observed.store
        if not store.ordered:
            return pooled(window_attention(observed, queries, positions), store, self.pool, self.pooling)
        return kernels.window_scores(
            queries,
            positions,
            store.keys,
            store.positions,
            store.start,
            store.length,
            scale=observed.scale,
            pool=self.pool,
            pooling=self.pooling,
            softcap=observed.softcap,
            sinks=observed.sinks,
        )


@dataclass(frozen=True)
class LastQuery(Scorer):
    """Attention of the newest query, averaged over the heads of the layer, so that all heads keep the same entries.

    Source: arXiv 2401.06104 (TOVA).
    """

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The prompt's last; none while decoding."""
        return 0 if decoding else 1

    def attention_window(self, plan: Plan) -> int:
        """One query."""
        return 1

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        attention = observed.added_up
        if attention is None:
            attention = window_attention(observed, *observed.last_queries(1))
        return mean_over_heads(attention, observed)


@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """All the attention that an entry ever got (arXiv 2306.14048, H2O).

    The prompt's queries count too, which costs a second pass over its keys, as long as the prompt's attention itself.
    """

    @property
    def accumulates(self) -> bool:
        """Yes."""
        return True

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """All of the prompt's; none while decoding."""
        return 0 if decoding else _ALL

    def attention_window(self, plan: Plan) -> int:
        """All."""
        return _ALL

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        if observed.added_up is not None:
            return observed.added_up
        queries, positions = observed.last_queries(_ALL)
        # A sum, as decoding goes on adding: the mean over all columns times their number, and over the group.
        group = queries.shape[2] // observed.store.kv_heads
        return window_attention(observed, queries, positions) * (queries.shape[1] * group)


def window_attention(observed: Observed, queries: Tensor, positions: Tensor) -> Tensor:
    """Mean attention of queries [B, Q, H, D] at positions [B, Q] per slot, [N] float32; no pooling."""
    store = observed.store
    return kernels.window_scores(
        queries,
        positions,
        store.keys,
        store.positions,
        store.start,
        store.length,
        scale=observed.scale,
        softcap=observed.softcap,
        sinks=observed.sinks,
    )


def mean_over_heads(scores: Tensor, observed: Observed) -> Tensor:
    """For every slot the mean score of its position over the KV heads that hold it, [N] float32."""
    place = _position_places(observed)
    total, count = observed.shard.sum(
        torch.stack([_added_up(place, numbers, observed) for numbers in (scores, torch.ones_like(scores))])
    )
    mean: Tensor = total / count.clamp(min=1)
    return mean[place]


def sum_over_heads(scores: Tensor, observed: Observed) -> Tensor:
    """For every row and position the sum of its scores over the KV heads that hold it, [B, longest row] float32."""
    total = _added_up(_position_places(observed), scores, observed)
    summed: Tensor = observed.shard.sum(total)[:-1].view(observed.store.rows, -1)
    return summed


def _position_places(observed: Observed) -> Tensor:
    """For every slot its row and position as one number, [N] int64; the last place takes empty slots."""
    store, width = observed.store, max(observed.row_seen)
    return torch.where(store.filled(), store.row_of_slots() * width + store.positions, store.rows * width)


def _added_up(place: Tensor, scores: Tensor, observed: Observed) -> Tensor:
    """The sum of the scores [N] at every place, [B * longest row + 1] float32; nothing from empty slots."""
    store = observed.store
    total = torch.zeros(store.rows * max(observed.row_seen) + 1, dtype=torch.float32, device=scores.device)
    total.index_add_(0, place, torch.where(store.filled(), scores.float(), 0.0))
    return total


def check_window(window: int, name: str = "window") -> None:
    """Refuse what is no number of tokens; `name` is the option's.

    Raises:
        ValueError: for anything but a positive whole number.
    """
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {window!r}")
