# SPDX-License-Identifier: Apache-2.0
"""Plan: what the pieces of a method may ask about the budget and the layout of what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .tensor_parallel import HeadShard


@dataclass(frozen=True)
class LayerPlace:
    """Where a compressed layer stands in its model.

    Attributes:
        index, count: it is layer `index` of `count` compressed layers.
        shard: the heads that this process has of it.
    """

    index: int = 0
    count: int = 1
    shard: HeadShard = field(default_factory=HeadShard)


class Plan:
    """How many entries a head keeps, and when. `ImagePlan` and `TextPlan` say it for images and for text.

    The first entries of a row that always stay (an image's condition, the sinks of a text) are not part of what pieces
    divide: budgets, targets and windows count the entries after them.
    """

    place: LayerPlace
    """The layer that asks."""

    @property
    def keeps_all(self) -> bool:
        """True if nothing ever has to leave: the cache is then a stock cache."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """Tokens between two evictions: an image row, or the interval of a text. Every region has room for them."""
        raise NotImplementedError

    def window_of(self, budget: int, *, tokens: int, rows: float) -> int:
        """Recent entries that are protected where a head keeps `budget` on the average.

        Args:
            budget: entries per KV head after the first ones.
            tokens: what is asked for in a text.
            rows: what is asked for in an image, in raster rows.
        """
        raise NotImplementedError

    def limit(self, seen: int) -> int:
        """The most entries, after the first ones, that a head can ever hold of a row that has seen so many tokens."""
        raise NotImplementedError

    def windows_of(self, budgets: Sequence[int], *, tokens: int, rows: float) -> list[int]:
        """`window_of` for every row of the batch."""
        return [self.window_of(budget, tokens=tokens, rows=rows) for budget in budgets]
