# SPDX-License-Identifier: Apache-2.0
"""Scores that weigh what is attended to against what is there twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pieces import Observed, Scorer
from ..plan import Plan
from ..ragged import RaggedKV
from .attention import WindowAttention, check_window, window_attention
from .neighbours import pooled
from .regions import blocks, entries, to_slots

_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Redundancy(Scorer):
    """Attended and not redundant entries stay (arXiv 2505.24133, R-KV).

    The score is `importance * a - (1 - importance) * r`: a is the mean attention of the last `window` queries, pooled
    over neighbours; r the softmax, over a head's entries, of the mean cosine similarity of an entry's key to the keys
    of the others. Of the entries that an entry resembles (similarity above `threshold`) the newest is not counted, so
    of many that say the same the newest stays.

    Every pair of entries is compared, which costs as much as the attention of the prompt; memory is bounded by blocks.

    Attributes:
        window: queries.
        pool: neighbours in position order that share the largest attention among them, an odd number; 1 for none.
        importance: weight of attention against redundancy, lambda in the paper.
        threshold: similarity above which two keys say the same.
    """

    window: int = 8
    pool: int = 7
    importance: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_window(self.window)
        WindowAttention(self.window, self.pool)  # refuses a pool that is none
        if not 0.0 <= self.importance <= 1.0:
            raise ValueError(f"importance must lie in [0, 1], got {self.importance}")
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is a cosine and must lie in [-1, 1], got {self.threshold}")

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The window's of the prompt; none while decoding."""
        return 0 if decoding else self.window

    def attention_window(self, plan: Plan) -> int:
        """The window, as far as it fits between two evictions."""
        return min(self.window, plan.step)

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store = observed.store
        attention = observed.added_up
        if attention is None:
            attention = window_attention(observed, *observed.last_queries(self.window))
        slots, filled = store.slots_in_order()  # [B, G, M]
        received = torch.where(filled, attention[slots], 0).double()
        # While decoding attention is a sum over queries; as shares both are the same.
        share = received / received.sum(-1, keepdim=True).clamp(min=1e-30)
        important = pooled(to_slots(share, slots, filled, store), store, self.pool, "max")
        redundant = redundancy(store, slots, filled, self.threshold)
        return self.importance * important - (1 - self.importance) * to_slots(redundant, slots, filled, store)


def redundancy(store: RaggedKV, slots: Tensor, filled: Tensor, threshold: float) -> Tensor:
    """Softmax over every region of an entry's mean similarity to the others, see `Redundancy`.

    Args:
        store: the layer's storage.
        slots, filled: [B, G, M], every region's slots in position order, and which of them hold an entry.
        threshold: of the cosine.

    Returns:
        [B, G, M] float64, zero where there is no entry.
    """
    longest = slots.shape[-1]
    unit = normalize(entries(store.keys, slots, filled, torch.float32), dim=-1)  # [B, G, M, D]
    wide = unit.double()
    # The sum of an entry's similarities is its product with the sum of all, without its own.
    total = (wide * wide.sum(2, keepdim=True)).sum(-1) - wide.square().sum(-1)
    # Places from 1 in position order, 0 for what is empty; a float32 holds them exactly.
    place = torch.arange(1, longest + 1, device=slots.device) * filled  # [B, G, M]
    newest = torch.zeros(slots.shape, device=slots.device)
    step = torch.arange(longest, device=slots.device)
    for block in blocks(longest, max(_BLOCK_ELEMENTS // max(slots.numel(), 1), 1)):
        likeness = unit[:, :, block] @ unit.mT  # [B, G, m, M]
        likeness[..., step[: likeness.shape[2]], step[block]] = float("-inf")  # itself
        newest[..., block] = likeness.gt_(threshold).mul_(place[:, :, None]).amax(-1)
    # The newest that an entry resembles is not counted.
    at = (newest.long() - 1).clamp(min=0)
    other = wide.gather(2, at[..., None].expand_as(wide))
    likeness = torch.where((newest > 0) & filled, (wide * other).sum(-1), 0.0)
    rows, heads = (torch.arange(size, device=slots.device) for size in slots.shape[:2])
    total.index_put_((rows[:, None, None], heads[:, None], at), -likeness, accumulate=True)
    mean = total / store.length[..., None].clamp(min=1)
    return mean.masked_fill(~filled, float("-inf")).softmax(-1).nan_to_num(0.0)
