# SPDX-License-Identifier: Apache-2.0
"""Stratified eviction, and plain lowest-score eviction as its special case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..budgets import ImagePlan
from ..pieces import Allocation, Observed, Selector


@dataclass(frozen=True)
class Stratified(Selector):
    """Evict the lowest scores, half from the older and half from the nearer entries (arXiv 2605.20600).

    The condition of an image or the sinks of a text, the anchors, and the recent window of every head are protected.

    Attributes:
        strata_ratio: share of the candidates, by rank, that forms the long stratum; 0 evicts by score alone.
        anchor_rows: first rows of an image that stay for good (arXiv 2512.04857), as far as the budget allows.
        sinks: first tokens of a text that stay for good (arXiv 2309.17453), at most a quarter of the budget.
    """

    strata_ratio: float = 0.5
    anchor_rows: float = 0.0
    sinks: int = 4

    def __post_init__(self) -> None:
        if not 0.0 <= self.strata_ratio <= 1.0:
            raise ValueError(f"strata_ratio must lie in [0, 1], got {self.strata_ratio}")
        if self.anchor_rows < 0:
            raise ValueError(f"anchor_rows must not be negative, got {self.anchor_rows}")
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks must be a whole number of tokens, 0 or more, got {self.sinks!r}")

    @property
    def nested(self) -> bool:
        """Without strata the lowest scores leave; with strata every step takes from both."""
        return self.strata_ratio == 0

    def victims(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Tensor:
        """[N] bool, True for what leaves."""
        store, plan = observed.store, observed.plan
        first = condition = observed.condition[:, None]  # [B, 1]
        if isinstance(plan, ImagePlan):
            # Anchors must leave room for the window, or more would be protected than may stay.
            room = allocation.targets - allocation.windows
            first = condition + room.clamp(min=0, max=round(self.anchor_rows * plan.row))
        return kernels.stratified_victims(
            scores,
            store.positions,
            store.start,
            store.length,
            first=first.expand_as(store.length).to(torch.int32),
            last=(observed.seen[:, None] - allocation.windows).to(torch.int32),
            evict=store.length - condition - allocation.targets,
            strata_ratio=self.strata_ratio,
        )
