# SPDX-License-Identifier: Apache-2.0
"""Scores from what is recent: the last row's queries, or the position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .. import kernels
from ..pieces import Observed


@dataclass(frozen=True)
class RecentQueries:
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

    @property
    def needs_attention(self) -> bool:
        """True for softmax."""
        return self.score == "softmax"

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        if observed.attention is not None:
            return observed.attention
        if observed.mean_query is None:
            raise RuntimeError("RecentQueries got neither a mean query nor attention to score with")
        store = observed.store
        return kernels.mean_query_logits(
            observed.mean_query, store.keys, store.start, store.length, scale=observed.scale
        )


@dataclass(frozen=True)
class Recency:
    """The newest entries score highest, whatever they hold (arXiv 2309.17453, with the condition as sinks)."""

    needs_mean_query: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def score_entries(self, observed: Observed) -> Tensor:
        """Positions as scores, [N] float32."""
        return observed.store.positions.float()
