# SPDX-License-Identifier: Apache-2.0
"""The four pieces of a method: scorer, allocator, selector and schedule.

A method is a composition of four small frozen dataclasses. Their fields are the method's options. They are pure: they
look at what a layer observed and return tensors; the cache does the moving. Nothing here may read the device from the
host while tokens are decoded, except an allocator, which runs once per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .budgets import ImagePlan
from .ragged import RaggedKV


@dataclass(frozen=True)
class Observed:
    """What a layer knows when it has to decide.

    Attributes:
        store: keys, values, positions, lengths.
        plan: budget and row.
        condition: [B] int32, condition tokens of each row; they hold the positions below this number.
        seen: [B] int32, real tokens of each row so far, so the newest position is `seen - 1`.
        scale: multiplies q.k.
        mean_query: [B, H, D] float32, mean of the queries since the last eviction, if the scorer needs it.
        queries: [B, Q, H, D], the last queries in order, if the allocator needs them.
        attention: [N] float32, attention that each slot got since the last eviction, summed over queries and group, if
            the scorer needs it.
    """

    store: RaggedKV
    plan: ImagePlan
    condition: Tensor
    seen: Tensor
    scale: float
    mean_query: Tensor | None = None
    queries: Tensor | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class Allocation:
    """What each region keeps after every eviction, condition not counted.

    Attributes:
        targets: [B, G] int32, entries kept.
        windows: [B, G] int32, how many of them are the newest.
        row_totals: the sum of each row of `targets`, on the host.
        largest: an upper bound of `targets`, on the host.
        local: [B, G] bool, True where a head was found to be local; None if the method has no head types.
    """

    targets: Tensor
    windows: Tensor
    row_totals: list[int]
    largest: int
    local: Tensor | None = None


class Scorer(Protocol):
    """Ranks entries: higher stays."""

    @property
    def needs_mean_query(self) -> bool: ...

    @property
    def needs_attention(self) -> bool: ...

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        ...


class Allocator(Protocol):
    """Gives every region its number of entries, once per image."""

    def queries_needed(self, plan: ImagePlan) -> int:
        """How many of the last queries must be there when it decides; 0 if it looks at none."""
        ...

    def allocate(self, observed: Observed) -> Allocation: ...


class Selector(Protocol):
    """Chooses who leaves."""

    def victims(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Tensor:
        """[N] bool, True for what leaves: exactly as many as are above each region's target, never protected ones."""
        ...


class Schedule(Protocol):
    """Says on the host, by counting tokens, when to evict."""

    def first(self, plan: ImagePlan) -> int:
        """Image tokens after which the first eviction may happen."""
        ...

    def due(self, before: int, after: int, plan: ImagePlan) -> bool:
        """Is an eviction due when the number of image tokens went from `before` to `after`?"""
        ...
