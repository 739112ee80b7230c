# SPDX-License-Identifier: Apache-2.0
"""Scores from how differently the last queries ask for an entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..budgets import ImagePlan
from ..kernels.mass_kinds import MassOf
from ..pieces import Observed, Scorer
from ..plan import Plan
from .attention import check_window
from .regions import blocks, entries, norms, region_slots, to_slots

_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class LogitSpread(Scorer):
    """The standard deviation of an entry's logits over the last queries, times the size of its value.

    The mean logit of many queries, which is that of their mean, does not see an entry that a few of them ask for and
    the others do not; the spread does. An entry that all ask for alike helps none of them to tell entries apart. The
    variance is averaged over the group before the root is taken. Attention that moves matters by how much it moves the
    head's output, hence the value.

    While tokens are decoded no query is held: the variance is the mean square of the logits less the square of their
    mean. Squares are added up per slot as logits are computed anyway, and the mean logit is that of the mean query, of
    which a running sum is kept. Both are of the same queries.

    An entry that was written after the first of these queries was not asked for by all of them. The part that it saw
    cannot be told from the sum, so it is not judged yet: it takes the largest score of those in its region that are.
    In an image the newest row is protected anyway. So it is in a text, whose queries are no more than its window unless
    either was changed or the budget is small; what is left leaves after everything that was judged, the oldest first.

    The difference of two float32 sums is good to about 1e-6 of the squares: where all logits of an entry are near 30,
    a spread below 0.03 may be rounding. At the end of a text's prompt queries are at hand and no difference is taken.

    Attributes:
        queries: how many of the last ones; None: one row of an image, 32 of a text. While decoding no more than there
            are between two evictions.
        by_value: multiply by the norm of the value.
    """

    queries: int | None = None
    by_value: bool = True

    def __post_init__(self) -> None:
        if self.queries is not None:
            check_window(self.queries, "queries")

    @property
    def needs_mean_query(self) -> bool:
        """Yes."""
        return True

    @property
    def adds_up(self) -> MassOf:
        """Squared logits."""
        return "squared_logits"

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The prompt's last; none while decoding."""
        return 0 if decoding else self._asked(plan)

    def attention_window(self, plan: Plan) -> int:
        """As many as were asked for, as far as they fit between two evictions."""
        return min(self._asked(plan), plan.step)

    def mean_window(self, plan: Plan) -> int:
        """The same."""
        return self.attention_window(plan)

    def _asked(self, plan: Plan) -> int:
        return self.queries or (plan.step if isinstance(plan, ImagePlan) else 32)

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        if observed.added_up is None:
            return self._of_queries(observed)
        return self._of_sums(observed, observed.added_up)

    def _of_queries(self, observed: Observed) -> Tensor:
        store, kv_heads = observed.store, observed.store.kv_heads
        queries, positions = observed.last_queries(self._asked(observed.plan))  # [B, Q, H, D], [B, Q]
        slots, filled = region_slots(store)  # [B, G, M]
        # The CPU has float64 at half the speed, and sums that do not depend on the batch; GPUs often have not.
        dtype = torch.float64 if slots.device.type == "cpu" else torch.float32
        real = positions >= 0
        count = real.sum(-1)[:, None, None, None].clamp(min=1)
        asking = torch.where(real[..., None, None], queries, 0).to(dtype) * observed.scale
        mean = asking.sum(1, keepdim=True) / count
        asking = torch.where(real[..., None, None], asking - mean, 0)
        asking = asking.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, G, R, Q, D]
        group = asking.shape[2]
        asking = asking.flatten(2, 3)
        variance = torch.zeros(slots.shape, dtype=dtype, device=slots.device)
        for block in blocks(slots.shape[-1], max(_BLOCK_ELEMENTS // max(asking[..., 0].numel(), 1), 16)):
            keys = entries(store.keys, slots[..., block], filled[..., block], dtype)  # [B, G, m, D]
            variance[..., block] = (asking @ keys.mT).square_().sum(2)
        spread = (variance / (count[..., 0] * group)).sqrt()
        return to_slots(self._weighed(spread, observed, slots), slots, filled, store)

    def _weighed(self, spread: Tensor, observed: Observed, slots: Tensor) -> Tensor:
        """Times the size of the values where there is a spread, and so an entry; both [B, G, M]."""
        if not self.by_value:
            return spread
        return torch.where(spread > 0, spread * norms(observed.store.values)[slots], 0.0)

    def _of_sums(self, observed: Observed, squares: Tensor) -> Tensor:
        """Scores [N] from the sums of squared logits [N] and the mean query."""
        mean, store = observed.mean_query, observed.store
        if mean is None:  # no query was seen since the last decision
            return torch.zeros_like(squares)
        by_head = mean.unflatten(1, (store.kv_heads, -1))  # [B, G, R, D]
        group = by_head.shape[2]
        of_mean = torch.zeros_like(squares)
        for r in range(group):
            own = by_head[:, :, r].contiguous()  # [B, G, D]
            of_mean += kernels.mean_query_logits(
                own, store.keys, store.start, store.length, scale=observed.scale
            ).square()
        slots, filled = region_slots(store)  # [B, G, M]
        count = observed.per_row(observed.query_counts or [0] * store.rows)[..., None]  # [B, 1, 1]
        variance = (squares[slots] / count.clamp(min=1) - of_mean[slots]) / group
        scores = self._weighed(torch.where(filled, variance, 0.0).clamp(min=0).sqrt(), observed, slots)
        judged = filled & (store.positions[slots] <= observed.seen[:, None, None] - count)
        largest = torch.where(judged, scores, 0.0).amax(-1, keepdim=True)
        return to_slots(torch.where(judged, scores, largest), slots, filled, store)
