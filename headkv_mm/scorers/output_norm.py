# SPDX-License-Identifier: Apache-2.0
"""Scores by what an entry adds to the layer's output."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import kernels
from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window
from .neighbours import pooled

if TYPE_CHECKING:
    from ..output_projections import OutputProjections


@dataclass(frozen=True)
class OutputNorm(Scorer):
    """The norm of what an entry adds to the output for the last queries (arXiv 2605.07234, LaProx).

    For a query head, the 2-norm over the last `window` queries of the attention an entry gets, times the norm of its
    value after the head's output projection; the mean over the group, averaged over neighbours. Scores of a row are
    divided by their sum over the layer, so that layers can be compared.

    Attributes:
        window: queries; while decoding as many as there are between two evictions, at most.
        pool: neighbours in position order over which the score is averaged, an odd number; 1 for none.
    """

    window: int = 32
    pool: int = 7
    projections: OutputProjections | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number of neighbours, at least 1, got {self.pool}")

    def for_model(self, model_or_config: Any) -> OutputNorm:
        """The same, knowing the output projections of a model.

        Raises:
            ValueError: for a configuration alone, or a model whose projections cannot be read.
        """
        from ..output_projections import OutputProjections

        bound = copy(self)
        object.__setattr__(bound, "projections", OutputProjections(model_or_config))
        return bound

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The window's; while decoding no more than there are between two evictions."""
        return min(self.window, plan.step) if decoding else self.window

    def held(self, plan: Plan) -> list[Tensor]:
        """The layer's Gram matrices, once they were needed."""
        gram = None if self.projections is None else self.projections.made(plan.place.index)
        return [] if gram is None else [gram]

    def held_bytes(self, heads: int, head_dim: int) -> int:
        """A [D, D] matrix per query head."""
        return heads * head_dim * head_dim * 4

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32; they sum to 1 over the entries of a row."""
        if self.projections is None:
            raise RuntimeError("this scorer does not know the model; a HeadKVCache tells it")
        store = observed.store
        queries, positions = observed.last_queries(self.window)
        norms = kernels.window_norms(
            queries,
            positions,
            store.keys,
            store.positions,
            store.start,
            store.length,
            self.projections.norms(store, observed.plan.place.index),
            scale=observed.scale,
            softcap=observed.softcap,
            sinks=observed.sinks,
        )
        scores = pooled(norms.float(), store, self.pool, "mean")
        row = store.row_of_slots()
        total = torch.zeros(store.rows, device=scores.device).index_add_(0, row, scores)
        total = observed.shard.sum(total)
        return scores / total.clamp(min=torch.finfo(torch.float32).tiny)[row]
