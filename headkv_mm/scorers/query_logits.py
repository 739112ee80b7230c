# SPDX-License-Identifier: Apache-2.0
"""Scores from the logits of the last queries, one by one, rather than from their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..budgets import ImagePlan
from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window
from .regions import blocks, entries, region_slots, to_slots

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class QueryLogits(Scorer):
    """How much one of the last queries asks for an entry, or how differently they do.

    The mean logit of many queries, which is that of their mean, does not see an entry that a single one of them asks
    for. "largest" is the largest logit over the queries and the group, "spread" the standard deviation of the logits
    over the queries, averaged over the group. The queries since the last eviction are held for that.

    Attributes:
        statistic: "largest" or "spread".
        queries: how many of the last ones; None: one row of an image, 32 of a text. While decoding no more than there
            are between two evictions.
    """

    statistic: Literal["largest", "spread"] = "largest"
    queries: int | None = None

    def __post_init__(self) -> None:
        if self.statistic not in ("largest", "spread"):
            raise ValueError(f"statistic must be 'largest' or 'spread', got {self.statistic!r}")
        if self.queries is not None:
            check_window(self.queries, "queries")

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """As many as were asked for; while decoding no more than there are between two evictions."""
        asked = self.queries or (plan.step if isinstance(plan, ImagePlan) else 32)
        return min(asked, plan.step) if decoding else asked

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store, kv_heads = observed.store, observed.store.kv_heads
        queries, positions = observed.last_queries(self.queries_needed(observed.plan, decoding=False))
        slots, filled = region_slots(store)  # [B, G, M]
        real = positions >= 0  # [B, Q]
        asking = torch.where(real[..., None, None], queries, 0).float() * observed.scale
        asking = asking.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, G, R, Q, D]
        hidden = ~real[:, None, None, :, None]
        count = real.sum(-1)[:, None, None, None].clamp(min=1)
        scores = torch.zeros(slots.shape, device=slots.device)
        for block in blocks(slots.shape[-1], max(_BLOCK_ELEMENTS // max(asking[..., 0].numel(), 1), 16)):
            keys = entries(store.keys, slots[..., block], filled[..., block], torch.float32)  # [B, G, m, D]
            logits = asking @ keys[:, :, None].mT  # [B, G, R, Q, m]
            if self.statistic == "largest":
                scores[..., block] = logits.masked_fill(hidden, float("-inf")).amax((2, 3))
            else:
                mean = logits.sum(3) / count  # [B, G, R, m]; hidden queries are zero
                off = (logits - mean[:, :, :, None]).masked_fill(hidden, 0.0)
                scores[..., block] = (off.square().sum(3) / count).sqrt().mean(2)
        return to_slots(scores, slots, filled, store)
