# SPDX-License-Identifier: Apache-2.0
"""TextPlan: how many entries a head keeps of a text, and how often it evicts while text is generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from .budgets import Budget, StorageCost, budget_bytes
from .plan import LayerPlace, Plan

SMALLEST = 8
"""Entries below which a head can hold no sinks, no window and anything else."""

_INTERVALS = (16, 128)
_SHARE_INTERVAL = 32
"""The same for every row, whatever its length: rows of a batch evict together, and as they would alone."""
_PART = 32


@dataclass(frozen=True)
class TextPlan(Plan):
    """Budgets of a text, sinks and window included in what the user asked for.

    Attributes:
        budget: a share of the tokens seen, which grows with the text; or entries per KV head, which stay the same.
        interval: decoded tokens between two evictions; None: 32 for a share, and for entries a 32nd of them, at least
            16 and at most 128, so that what waits for its eviction is little beside what is kept.
        sinks: first entries of a row that always stay.
        place: the layer.
    """

    budget: float | int
    interval: int | None = None
    sinks: int = 4
    place: LayerPlace = field(default_factory=LayerPlace)

    @property
    def keeps_all(self) -> bool:
        """Only for a share of everything: how long the text will get is not known."""
        return isinstance(self.budget, float) and self.budget >= 1.0

    @property
    def step(self) -> int:
        """Decoded tokens between two evictions."""
        if self.interval is not None:
            return self.interval
        if isinstance(self.budget, float):
            return _SHARE_INTERVAL
        shortest, longest = _INTERVALS
        return min(max(self.budget // _PART, shortest), longest)

    def held_sinks(self, entries: int) -> int:
        """Sinks among `entries` of a head: at most a quarter."""
        return min(self.sinks, entries // 4)

    def entries(self, seen: int) -> int:
        """Entries that a head keeps on the average, everything included, once `seen` tokens went through."""
        if isinstance(self.budget, int):
            return self.budget
        return max(round(self.budget * seen), SMALLEST)

    def grown(self, entries: int, seen: int) -> int:
        """Entries of a row that had `entries` before, while decoding: a share grows by steps of a 32nd.

        Between two steps regions stay as they are, so a text that gets longer is not copied at every eviction.
        """
        wanted = self.entries(seen)
        return wanted if wanted >= entries + max(entries // _PART, 1) else entries

    def window_of(self, budget: int, *, tokens: int, rows: float) -> int:
        """At most half of the budget; the other half is what a method may choose."""
        return min(tokens, budget // 2)

    def limit(self, seen: int) -> int:
        """What the row has seen; while decoding there will be more, and budgets that are shares grow with it."""
        return max(seen - self.held_sinks(self.entries(seen)), 0)


def text_plan(
    budget: Budget,
    *,
    interval: int | None = None,
    sinks: int = 4,
    place: LayerPlace | None = None,
    cost: StorageCost | None = None,
) -> TextPlan:
    """Turn a budget into a plan.

    Args:
        budget: see `Budget`.
        interval, sinks, place: see `TextPlan`.
        cost: what entries cost; needed for a budget in bytes only.

    Raises:
        ValueError: if the budget is too small to hold anything but sinks.
    """
    place = place or LayerPlace()
    if isinstance(budget, str):
        if cost is None:
            raise ValueError(f"budget {budget!r} is in bytes, which can be divided only when the batch is known")
        nbytes = budget_bytes(budget)
        entries = nbytes // cost.per_entry
        for _ in range(4):  # the interval depends on the entries, and both must fit
            entries = (nbytes - cost.of(0, TextPlan(max(entries, 1), interval, sinks).step)) // cost.per_entry
        while entries >= SMALLEST and cost.of(entries, TextPlan(entries, interval, sinks).step) > nbytes:
            entries -= 1
        if entries < SMALLEST:
            needed = cost.of(SMALLEST, TextPlan(SMALLEST, interval, sinks).step)
            raise ValueError(
                f"budget {budget!r} leaves {max(entries, 0)} entries per KV head, fewer than {SMALLEST}; "
                f"use at least {needed} bytes"
            )
        budget = int(entries)
    elif isinstance(budget, int) and budget < SMALLEST:
        raise ValueError(
            f"budget {budget} is too small for a text: a KV head must keep at least {SMALLEST} entries, sinks and "
            "window included"
        )
    return TextPlan(budget, interval, sinks, place)
