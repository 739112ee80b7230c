# SPDX-License-Identifier: Apache-2.0
"""Scores from the attention that queries like the last ones would give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window
from .regions import blocks, entries, norms, region_slots, to_slots

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Attention expected from Gaussian queries with the mean and covariance of the last ones (arXiv 2510.00636).

    With mean m and full covariance S of a query head's last `queries` rotated queries, an entry's logit is
    `scale m.k + scale^2 k.S.k / 2`. Its softmax over the region, averaged over the group, gives a; the score is
    `(a + epsilon) ||v||`. `scale m.k` is the mean of the queries' logits and `scale^2 k.S.k` their variance, so they
    are computed from logits and no D x D matrix is made. A softcap or learned sinks of the model are left out: the
    expectation has no closed form with them.

    Attributes:
        queries: how many, of the prompt or of the tokens decoded since the last eviction (fewer if there are no more).
        epsilon: added to the expected attention, so that among entries that nobody asks for the values decide.
    """

    queries: int = 128
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_window(self.queries, "queries")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """As many as were asked for; while decoding no more than there are between two evictions."""
        return min(self.queries, plan.step) if decoding else self.queries

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store = observed.store
        queries, positions = observed.last_queries(self.queries)  # [B, Q, H, D], [B, Q]
        slots, filled = region_slots(store)  # [B, G, M]
        # The CPU has float64 at half the speed, and sums that do not depend on the batch; GPUs often have not.
        dtype = torch.float64 if slots.device.type == "cpu" else torch.float32
        batch, count, heads, _ = queries.shape
        kv_heads = store.kv_heads
        group = heads // kv_heads
        real = (positions >= 0).to(dtype)  # [B, Q]
        share = (real / real.sum(-1, keepdim=True).clamp(min=1))[:, None, None, :, None]
        asking = torch.where(positions[..., None, None] >= 0, queries, 0).to(dtype) * observed.scale
        asking = asking.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)  # [B, G, R, Q, D]
        mean = (asking * share).sum(3)  # [B, G, R, D]
        # A sum of squares over these is a variance.
        centred = ((asking - mean[:, :, :, None]) * share.sqrt()).flatten(2, 3)  # [B, G, R * Q, D]
        expected = torch.full(
            (batch, kv_heads, group, slots.shape[-1]), float("-inf"), dtype=dtype, device=slots.device
        )
        for block in blocks(slots.shape[-1], max(_BLOCK_ELEMENTS // (batch * heads * max(count, 1)), 16)):
            keys = entries(store.keys, slots[..., block], filled[..., block], dtype).mT  # [B, G, D, m]
            variance = (centred @ keys).square_().unflatten(2, (group, count)).sum(3)  # [B, G, R, m]
            logits = mean @ keys + variance / 2
            expected[..., block] = logits.masked_fill(~filled[:, :, None, block], float("-inf"))
        attention = expected.softmax(-1).nan_to_num(0.0).mean(2)  # [B, G, M]; NaN where a region is empty
        lengths = torch.where(filled, norms(store.values)[slots], 0)
        return to_slots((attention + self.epsilon) * lengths, slots, filled, store)
