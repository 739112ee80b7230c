# SPDX-License-Identifier: Apache-2.0
"""Eviction by segments of equal attention mass: every stretch of the text keeps a quota, its best by the scorer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pieces import Allocation, Observed, Selection, Selector
from ..plan import Plan
from ..scorers.attention import check_window, window_attention
from ..scorers.neighbours import pooled
from ..scorers.regions import to_slots

_BISECTIONS = 64
_TINY = 1e-12
"""Mass of a segment that nobody looked at: it takes what no other can take."""


@dataclass(frozen=True)
class MassSegments(Selector):
    """Every stretch of a text keeps a quota by the attention it gets; in it, its best entries (arXiv 2605.23200, AMS).

    Per head, the attention of the last queries, pooled over neighbours, is the mass of its entries. Together with a
    credit, a moving average of the mass over the evictions so far, it cuts the entries in position order into
    segments. A segment's quota is its share of what is kept, but at least `least` and what is protected in it, and at
    most its length; quotas sum to exactly what the head keeps. Which entries of a segment stay says the scorer, so the
    selector goes with every scorer: a single stretch cannot take all that is kept, as it can where all entries compete.

    Attributes:
        mass_step: share of the mass at which a segment ends.
        shortest, longest: entries of a segment; the last one may be shorter.
        least: smallest quota, as far as what is kept suffices for all segments.
        queries: last queries whose attention counts.
        neighbours: entries over which the attention is averaged, an odd number.
        credit: weight of the credit beside the mass.
        decay: of the credit from one eviction to the next.
        sinks: first tokens of a text that stay for good (arXiv 2309.17453), at most a quarter of the budget.
    """

    mass_step: float = 0.02
    shortest: int = 32
    longest: int = 1024
    least: int = 8
    queries: int = 32
    neighbours: int = 5
    credit: float = 0.3
    decay: float = 0.8
    sinks: int = 4

    def __post_init__(self) -> None:
        if not 0.0 < self.mass_step <= 1.0:
            raise ValueError(f"mass_step must lie in (0, 1], got {self.mass_step}")
        for name in ("shortest", "longest", "queries"):
            check_window(getattr(self, name), name)
        if self.longest < self.shortest:
            raise ValueError(f"longest ({self.longest}) must be at least shortest ({self.shortest})")
        for name in ("least", "sinks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}")
        check_window(self.neighbours, "neighbours")
        if self.neighbours % 2 == 0:
            raise ValueError(f"neighbours must be an odd number, got {self.neighbours}")
        for name in ("credit", "decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """The last queries; while decoding as far as they come between two evictions."""
        return min(self.queries, plan.step) if decoding else self.queries

    @property
    def remembers(self) -> bool:
        """The credit."""
        return True

    def select(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Selection:
        """Who leaves, and the credit [N] of every entry."""
        store = observed.store
        slots, filled = store.slots_in_order()  # [B, G, M]
        attention = window_attention(observed, *observed.last_queries(self.queries))
        mass = _shares(pooled(attention, store, self.neighbours, "mean")[slots], filled)  # [B, G, M] float64
        old = torch.zeros_like(mass) if observed.credit is None else observed.credit[slots].double()
        credit = self.decay * old + (1 - self.decay) * mass
        used = _shares((1 - self.credit) * mass + self.credit * credit, filled)
        positions = torch.where(filled, store.positions[slots], 0)
        condition = observed.condition[:, None, None]
        newest = (observed.seen[:, None] - allocation.windows)[..., None]
        protected = filled & ((positions < condition) | (positions >= newest))
        keep = observed.condition[:, None] + allocation.targets  # [B, G]
        # Heads from which nothing leaves decide nothing: a row's credit must not depend on the rows beside it.
        credit = torch.where((store.length > keep)[..., None], credit, old)
        keep = keep.minimum(store.length)
        stays = self.chosen(used, scores[slots].float(), filled, protected, keep.long())
        leaves = to_slots((filled & ~stays).float(), slots, filled, store) > 0
        return Selection(leaves, to_slots(credit, slots, filled, store).clone())

    def chosen(self, mass: Tensor, scores: Tensor, filled: Tensor, protected: Tensor, keep: Tensor) -> Tensor:
        """Which entries stay.

        Args:
            mass: [B, G, M] float64, in position order; each head's sums to 1.
            scores: [B, G, M], higher stays; of equals the newer.
            filled: [B, G, M] bool, the first of each head.
            protected: [B, G, M] bool.
            keep: [B, G] int64, at least what is protected and at most what is filled.

        Returns:
            [B, G, M] bool, exactly `keep` of each head.
        """
        segment = segments(mass, filled, step=self.mass_step, shortest=self.shortest, longest=self.longest)
        count = int(segment_bound(mass.shape[-1], self.mass_step, self.shortest, self.longest))
        shape = (*mass.shape[:2], count)
        # What is empty adds nothing anywhere.
        lengths = mass.new_zeros(shape).scatter_add_(2, segment, filled.double())
        held = mass.new_zeros(shape).scatter_add_(2, segment, protected.double())
        weights = mass.new_zeros(shape).scatter_add_(2, segment, torch.where(filled, mass, 0.0))
        quota = quotas(weights, lengths, held, keep.double(), self.least)  # [B, G, S]
        # Protected first, then the best. In the end those of one segment lie together, so a place in it is a rank.
        ranked = torch.where(protected, float("inf"), scores).masked_fill(~filled, float("-inf"))
        order = ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)
        order = mass.shape[-1] - 1 - order
        order = order.gather(-1, segment.gather(-1, order).argsort(dim=-1, stable=True))
        ordered = segment.gather(-1, order)
        first = lengths.cumsum(-1) - lengths  # [B, G, S], filled entries of the segments before
        empty = (~filled).gather(-1, order)
        place = (~empty).double().cumsum(-1) - 1 - first.gather(-1, ordered)
        stays = (place < quota.gather(-1, ordered)) & ~empty
        return torch.zeros_like(filled).scatter_(-1, order, stays)


def segment_bound(entries: int, step: float, shortest: int, longest: int) -> int:
    """At most how many segments `entries` can have, so that nothing has to be read from the device."""
    by_mass = int(1 / step) + 2 + entries // longest
    return max(min(-(-entries // shortest), by_mass), 1)


def segments(mass: Tensor, filled: Tensor, *, step: float, shortest: int, longest: int) -> Tensor:
    """The segment of every entry.

    A segment ends where the mass summed from the first entry on passes the next multiple of `step`, but never before
    `shortest` entries nor after `longest`.

    Args:
        mass: [B, G, M] float64, not negative, sums to 1.
        filled: [B, G, M] bool.

    Returns:
        [B, G, M] int64 from 0 on; what is empty belongs to the last segment of its head.
    """
    entries = mass.shape[-1]
    total = torch.where(filled, mass, 0.0).cumsum(-1)
    length = filled.sum(-1, keepdim=True)  # [B, G, 1]
    starts = torch.zeros(*mass.shape[:2], 1, dtype=torch.int64, device=mass.device)
    marks = torch.zeros(filled.shape, dtype=torch.int64, device=mass.device)
    for _ in range(segment_bound(entries, step, shortest, longest) - 1):
        before = torch.where(starts > 0, total.gather(-1, (starts - 1).clamp(min=0)), 0.0)
        # A little more than half a rounding error, so that a sum that meets a multiple counts as having passed it.
        goal = ((before / step + 1e-9).floor() + 1) * step
        cut = torch.searchsorted(total, goal - 1e-9 * step) + 1
        starts = cut.maximum(starts + shortest).minimum(starts + longest)
        begins = starts < length
        marks.scatter_add_(-1, starts.clamp(max=entries - 1), begins.long())
        starts = torch.where(begins, starts, length)  # done: nothing begins any more
    return marks.cumsum(-1)


def quotas(weights: Tensor, lengths: Tensor, protected: Tensor, keep: Tensor, least: int) -> Tensor:
    """Entries that each segment keeps.

    In proportion to its weight, but at least what is protected in it and `least` (less where `keep` does not suffice
    for that in all segments), and at most its length. Whole by largest remainder.

    Args:
        weights: [..., S] float64, not negative.
        lengths: [..., S] float64, whole; 0 for segments that do not exist.
        protected: [..., S] float64, whole, at most `lengths`.
        keep: [...] float64, whole, from the sum of `protected` to that of `lengths`.

    Returns:
        [..., S] float64, whole, sums to exactly `keep`.
    """
    keep = keep[..., None]
    count = (lengths > 0).sum(-1, keepdim=True).clamp(min=1)
    room = keep - protected.sum(-1, keepdim=True)
    smallest = (room / count).floor().clamp(min=0, max=least)
    low = protected.maximum(smallest).minimum(lengths)
    # The lowest never sum to more than `keep`: beyond what is protected no segment gets more than its part of the room.
    weights = weights + _TINY * weights.sum(-1, keepdim=True) + _TINY * (lengths > 0)
    below, above = torch.zeros_like(keep), lengths.sum(-1, keepdim=True) / weights.clamp(min=_TINY**2).amin(-1, True)
    for _ in range(_BISECTIONS):
        middle = _between(below, above)
        enough = (weights * middle).maximum(low).minimum(lengths).sum(-1, keepdim=True) >= keep
        below, above = torch.where(enough, below, middle), torch.where(enough, middle, above)
    share = (weights * below).maximum(low).minimum(lengths)
    # From below, so what is missing is less than one entry per segment, and largest remainders settle it.
    base = share.floor()
    left = keep - base.sum(-1, keepdim=True)
    return base + _rank_below(torch.where(base < lengths, share - base, -1.0), left) * (base < lengths)


def _between(below: Tensor, above: Tensor) -> Tensor:
    """The geometric middle of two scales, as they may be orders of magnitude apart; of zero, a tiny part of `above`."""
    return torch.where(below > 0, (below * above).sqrt(), above * _TINY)


def _rank_below(values: Tensor, count: Tensor) -> Tensor:
    """[..., S] float64, 1 for the `count` [..., 1] largest values of a row, of equals the first."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous()
    )
    return (rank < count).double()


def _shares(mass: Tensor, filled: Tensor) -> Tensor:
    """Mass in float64 that sums to 1 over the entries of each head; the same for all where nobody was looked at."""
    mass = torch.where(filled, mass.double().clamp(min=0), 0.0)
    total = mass.sum(-1, keepdim=True)
    even = filled.double() / filled.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, mass / total.clamp(min=torch.finfo(torch.float64).tiny), even)
