# SPDX-License-Identifier: Apache-2.0
"""Scores by the attention of a layer's retrieval heads alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window
from .neighbours import pooled
from .regions import to_slots

HeadScores = tuple[tuple[float, ...], ...]
"""By compressed layer and query head."""


@dataclass(frozen=True)
class RetrievalHeads(Scorer):
    """What the layer's best retrieval heads attend to, the same for all heads (arXiv 2508.02401, CompressKV).

    A head table of kind "srh" says which query heads find answers. Attention of the last `window` queries, averaged
    over them and over the layer's `heads` best heads, and over neighbours. In a layer whose best head scores under
    `weak` of the model's best, no head is a retrieval head, and all of them count.

    Attributes:
        head_table: file of a head table; None for the one that ships for the model.
        heads: query heads of a layer that count.
        weak: share of the model's best score below which a layer has no retrieval heads.
        window: queries; while decoding as many as there are between two evictions, at most.
        pool: neighbours in position order over which the score is averaged, an odd number; 1 for none.
        head_scores: scores of one's own in place of a table's, by compressed layer and query head.
    """

    head_table: str | None = None
    heads: int = 4
    weak: float = 0.05
    window: int = 8
    pool: int = 5
    head_scores: HeadScores | None = None

    def __post_init__(self) -> None:
        check_window(self.window)
        check_window(self.heads, "heads")
        if not 0.0 <= self.weak <= 1.0:
            raise ValueError(f"weak must lie in [0, 1], got {self.weak}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number of neighbours, at least 1, got {self.pool}")
        if self.head_table is not None and not isinstance(self.head_table, str):
            raise ValueError(f"head_table must be the name of a file, got {self.head_table!r}")

    def for_model(self, model_or_config: Any) -> RetrievalHeads:
        """The same with the scores of the table, if it has none yet.

        Raises:
            ValueError: if there is no table for this model, or the table is of another model or kind.
            FileNotFoundError: if there is no such file.
        """
        if self.head_scores is not None:
            return self
        from ..head_tables import head_table_for

        return replace(self, head_scores=head_table_for(model_or_config, self.head_table, kind="srh").scores)

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The window's; while decoding no more than there are between two evictions."""
        return min(self.window, plan.step) if decoding else self.window

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store, shard = observed.store, observed.shard
        queries, positions = observed.last_queries(self.window)  # [B, Q, H, D]
        kv_heads, group = store.kv_heads, queries.shape[2] // store.kv_heads
        counted = self._counted(observed, queries.shape[2])
        own = counted[shard.rank * queries.shape[2] :][: queries.shape[2]].unflatten(0, (kv_heads, group))  # [G, R]
        slots, filled = store.slots_in_order()  # [B, G, M]
        width = max(observed.row_seen)
        place = (
            torch.where(filled, store.positions[slots], width).long().flatten(1)
        )  # the last place takes what is empty
        total = torch.zeros(store.rows, width + 1, device=slots.device)
        for r in range(group):
            mass = kernels.window_scores(
                queries[:, :, r::group],
                positions,
                store.keys,
                store.positions,
                store.start,
                store.length,
                scale=observed.scale,
                softcap=observed.softcap,
                sinks=None if observed.sinks is None else observed.sinks[r::group],
            )
            share = torch.where(filled, mass[slots].float() * own[:, r, None], 0.0)  # [B, G, M]
            total.scatter_add_(1, place, share.flatten(1))
        total = shard.sum(total) / counted.sum()
        scores = total.gather(1, place).view_as(slots)
        return pooled(to_slots(scores, slots, filled, store), store, self.pool, "mean")

    def _counted(self, observed: Observed, own_heads: int) -> Tensor:
        """Which query heads of the layer count, [H] float32 of ones and zeros.

        Raises:
            ValueError: without scores, or for those of a model of another shape.
        """
        place, heads = observed.plan.place, own_heads * observed.shard.size
        if self.head_scores is None:
            raise ValueError("this scorer has no scores; a HeadKVCache takes them from the model's head table")
        if (len(self.head_scores), len(self.head_scores[0])) != (place.count, heads):
            raise ValueError(
                f"the scores are of {len(self.head_scores)} layers with {len(self.head_scores[0])} query heads, and "
                f"the model has {place.count} layers with {heads}"
            )
        best = best_heads(self.head_scores, place.index, self.heads, self.weak)
        mask = torch.zeros(heads)
        mask[list(best)] = 1.0
        return mask.to(observed.seen.device)


def best_heads(scores: Sequence[Sequence[float]], layer: int, count: int, weak: float) -> list[int]:
    """The query heads of a layer that count: its `count` best, or all where even the best is weak."""
    own = scores[layer]
    if max(own) < weak * max(map(max, scores)):
        return list(range(len(own)))
    return sorted(range(len(own)), key=lambda head: -own[head])[:count]
