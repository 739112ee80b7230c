# SPDX-License-Identifier: Apache-2.0
"""Scores from what is recent: the last row's queries, or the position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .. import kernels
from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import window_attention


@dataclass(frozen=True)
class RecentQueries(Scorer):
    """How much the queries since the last eviction ask for an entry.

    Sources: arXiv 2605.20600 ("logits"), arXiv 2512.04857 ("softmax").

    Attributes:
        score: "logits": mean of q.k over those queries and the group, which is the logit of their mean, so only a
            running sum has to be stored. "softmax": their mean attention, accumulated while tokens are decoded.
    """

    score: Literal["logits", "softmax"] = "logits"

    def __post_init__(self) -> None:
        if self.score not in ("logits", "softmax"):
            raise ValueError(f"score must be 'logits' or 'softmax', got {self.score!r}")

    @property
    def needs_mean_query(self) -> bool:
        """True for logits."""
        return self.score == "logits"

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """One step of a prompt's; none while decoding, where what matters of them is added up."""
        return 0 if decoding else plan.step

    def attention_window(self, plan: Plan) -> int:
        """The queries since the last eviction, for softmax."""
        return plan.step if self.score == "softmax" else 0

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        if observed.added_up is not None:
            return observed.added_up
        if self.score == "softmax":
            return window_attention(observed, *observed.last_queries(observed.plan.step))
        if observed.mean_query is None:
            raise RuntimeError("RecentQueries got no mean query to score with")
        store = observed.store
        return kernels.mean_query_logits(
            observed.mean_query, store.keys, store.start, store.length, scale=observed.scale
        )


@dataclass(frozen=True)
class Recency(Scorer):
    """The newest entries score highest, whatever they hold (arXiv 2309.17453, with the condition as sinks)."""

    def score_entries(self, observed: Observed) -> Tensor:
        """Positions as scores, [N] float32."""
        return observed.store.positions.float()
