# SPDX-License-Identifier: Apache-2.0
"""Budgets in proportion to one number per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..pieces import Observed
from ..scorers.attention import window_attention
from ..scorers.keys import unit_key_sum
from .competition import Competition, Pool
from .pooled import candidates_of

Statistic = Literal["entropy", "backward", "curve", "distant", "pointed", "keys"]
_ROUNDING = 1e-3
"""How far sums of shares of the attention in single precision may be above 1, and more."""
STATISTICS: tuple[Statistic, ...] = ("entropy", "backward", "curve", "distant", "pointed", "keys")


@dataclass(frozen=True)
class Proportional(Competition):
    """Above its floor every head gets entries in proportion to a statistic of it.

    Of the attention of the last queries, averaged over them and the group, and without the first tokens that always
    stay and the window:

    - "entropy": the number of entries that would have the same entropy if all were attended to alike.
    - "backward": entries from the window on backward that hold, with the window, a share `tau` of the attention. This
      is the number by which arXiv 2605.20600 tells local heads from global ones.
    - "curve": best entries that hold a share `tau` of the attention, with what always stays.
    - "distant": the share of the attention. Each query looks back from itself: what counts is what lies as far behind
      it as the window reaches.
    - "pointed": the same with the squares of every single query's attention. It is large where a query finds one far
      entry, which another query will look for elsewhere; a head that spreads its attention over many entries can spare
      some of them.
    - "keys": no attention, but how much the keys of the head differ: 1 - |mean of k / |k||^2.

    Attributes:
        statistic: one of these.
        tau: share of the attention, for "backward" and "curve".
        contrast: power to which the statistic is raised: a larger one leaves more to the heads that are ahead.
    """

    statistic: Statistic = "entropy"
    tau: float = 0.9
    contrast: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        if not 0.0 < self.tau <= 1.0:
            raise ValueError(f"tau must lie in (0, 1], got {self.tau}")
        if self.contrast < 0:
            raise ValueError(f"contrast must not be negative, got {self.contrast}")

    def look(self, observed: Observed, pool: Pool) -> Tensor:
        """The statistic, [B, all heads] float64."""
        if self.statistic == "keys":
            return observed.shard.gather(key_spread(observed))
        queries, positions = observed.last_queries(self.queries_needed(observed.plan))
        window = observed.per_row(self.windows(observed))
        if self.statistic in ("distant", "pointed"):
            return attention_behind(observed, queries, positions, window, power=1 if self.statistic == "distant" else 2)
        if self.statistic == "backward":
            needed = self._backward(observed, queries, positions) - window
            return observed.shard.gather(needed.clamp(min=0).double())
        attention = window_attention(observed, queries, positions)
        candidates, mass = candidates_of(observed, attention, window)  # [B, G, M]
        mass = torch.where(candidates, mass.double(), 0.0)
        if self.statistic == "curve":
            lost = mass.sort(dim=-1).values.cumsum(-1)  # by keeping all others
            return (lost > 1 - self.tau).sum(-1).double()
        return effective_number(mass)

    def weigh(self, noted: Tensor, pool: Pool) -> Tensor:
        """The statistic, with its contrast; at most 1."""
        largest = noted.amax(-1, keepdim=True).clamp(min=torch.finfo(noted.dtype).tiny)
        return (noted / largest) ** self.contrast

    def heaviest(self, noted: Tensor, observed: Observed, pool: Pool) -> Tensor:
        """A share of the attention or a difference is at most 1, and numbers of entries what was seen."""
        bound = observed.seen[:, None].double() if self.statistic in ("entropy", "backward", "curve") else 1.0
        largest = noted.amax(-1, keepdim=True).clamp(min=torch.finfo(noted.dtype).tiny)
        return (bound * (1 + _ROUNDING) / largest) ** self.contrast

    def _backward(self, observed: Observed, queries: Tensor, positions: Tensor) -> Tensor:
        store = observed.store
        return kernels.head_mass(
            queries,
            positions,
            store.keys,
            store.positions,
            store.start,
            store.length,
            scale=observed.scale,
            tau=self.tau,
            first_position=observed.condition,
        )


def attention_behind(observed: Observed, queries: Tensor, positions: Tensor, window: Tensor, *, power: int) -> Tensor:
    """The attention of queries that lies behind their windows, the first tokens that always stay left out.

    Args:
        observed: what is held.
        queries: [B, Q, H, D].
        positions: [B, Q], -1 for padding.
        window: [B, 1] int, tokens that end with each query.
        power: 1, or 2 for the squares of every query's attention, the mean over its group.

    Returns:
        [B, all heads] float64, means over the queries.
    """
    store = observed.store
    found = kernels.attention_behind(
        queries,
        positions,
        store.keys,
        store.positions,
        store.start,
        store.length,
        window[:, 0],
        scale=observed.scale,
        power=power,
        first_position=observed.condition,
        softcap=observed.softcap,
        sinks=observed.sinks,
    )
    return observed.shard.gather(found.double())


def effective_number(mass: Tensor) -> Tensor:
    """The exponential of the entropy of masses [..., M], not negative, in shares of their sum; 0 where all are 0."""
    # Running sums do not depend on how far a row is padded.
    total = mass.cumsum(-1)[..., -1:]
    share = mass / total.clamp(min=torch.finfo(mass.dtype).tiny)
    entropy = torch.special.entr(share).cumsum(-1)[..., -1]
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def key_spread(observed: Observed) -> Tensor:
    """1 - |mean of k / |k||^2 over the entries that a head of this process holds, [B, G] float64 in [0, 1]."""
    mean = unit_key_sum(observed) / observed.store.length[..., None].clamp(min=1)
    return (1 - mean.square().sum(-1)).clamp(min=0)
