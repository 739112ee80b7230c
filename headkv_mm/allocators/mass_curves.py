# SPDX-License-Identifier: Apache-2.0
"""Budgets that let heads lose as little attention as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..pieces import Observed
from ..scorers.attention import window_attention
from .competition import Competition, Pool
from .pooled import best_of_row, candidates_of

_NOTHING = -1.0
"""Below every share of attention: there is no such entry."""


@dataclass(frozen=True)
class MassCurves(Competition):
    """Water-filling on the heads' mass curves: what the last queries attend to, best entries first.

    The curve of a head is the attention that it loses if it keeps its k best entries beside the window. It falls more
    slowly with every entry, so filling the pool entry by entry, each into the head that gains most, is optimal: with
    `loss="sum"` for the attention that all heads together lose (for the scores of `WindowAttention` without
    neighbours that is `Pooled`, arXiv 2407.11550), with `loss="largest"` for the head that loses most.

    Only how many entries a head keeps is decided so; which ones says the scorer, which may be any.

    Attributes:
        loss: "sum" or "largest", what is made small.
    """

    nothing: ClassVar[float] = _NOTHING

    loss: Literal["sum", "largest"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("sum", "largest"):
            raise ValueError(f"loss must be 'sum' or 'largest', got {self.loss!r}")

    def look(self, observed: Observed, pool: Pool) -> Tensor:
        """What the k-th entry is worth to a head that has those before, [B, all heads, K] float32, falling."""
        attention = window_attention(observed, *observed.last_queries(self.queries_needed(observed.plan)))
        candidates, mass = candidates_of(observed, attention, observed.per_row(self.windows(observed)))  # [B, G, M]
        mass = torch.where(candidates, mass.double(), 0.0).sort(dim=-1, descending=True).values
        worth = mass if self.loss == "sum" else mass.flip(-1).cumsum(-1).flip(-1)
        there = torch.arange(mass.shape[-1], device=mass.device) < candidates.sum(-1, keepdim=True)
        worth = worth.masked_fill(~there, _NOTHING).float()
        # As long in every layer and process, so that they can be put together.
        longest = max(observed.plan.limit(seen) for seen in observed.row_seen)
        longest = min(longest, int(pool.most.max()))
        return torch.nn.functional.pad(worth, (0, max(longest - worth.shape[-1], 0)), value=_NOTHING)[..., :longest]

    def weigh(self, noted: Tensor, pool: Pool) -> Tensor:
        """How many of the best entries of a row each head has, those that every head keeps not counted; [B, K]."""
        # While an image is written fewer entries are there than will be kept.
        least, most = (pool.counted * bound // pool.free.clamp(min=1) for bound in (pool.least, pool.most))
        rank = torch.arange(noted.shape[-1], device=noted.device)
        open_ = (noted > _NOTHING) & (rank >= least[..., None]) & (rank < most[..., None].clamp(min=1))
        return best_of_row(noted, open_, (pool.counted - least) * noted.shape[1])

    def heaviest(self, noted: Tensor, observed: Observed, pool: Pool) -> Tensor:
        """All entries of a head."""
        return pool.most.double()
