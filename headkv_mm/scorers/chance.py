# SPDX-License-Identifier: Apache-2.0
"""Scores by chance: what every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pieces import Observed, Scorer
from .regions import region_slots, to_slots

_LOW = 0xFFFFFFFF
_PRIMES = (0x7FEB352D, 0x45D9F3B)
"""Below 2^31, so that the product with a 32-bit number fits into an int64."""


@dataclass(frozen=True)
class Random(Scorer):
    """A number that depends on the seed, the layer, the head and the position only.

    So a run can be repeated, a row of a batch keeps what it would keep alone, and an entry that was lucky once stays
    so: what is left is a random subset of everything that was there.

    Attributes:
        seed: another number, another subset.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32 in [0, 1)."""
        store = observed.store
        slots, filled = region_slots(store)  # [B, G, M]
        first = observed.shard.rank * store.kv_heads
        heads = torch.arange(first, first + store.kv_heads, device=slots.device)[:, None]  # [G, 1]
        key = torch.full_like(heads, self.seed & _LOW)
        for number in (torch.full_like(heads, observed.plan.place.index), heads, store.positions[slots].clamp(min=0)):
            key = _mixed(key ^ _mixed(number.long() + 1))
        # 24 bits are what a float32 holds exactly.
        return to_slots((key >> 8).float() / (1 << 24), slots, filled, store)


def _mixed(number: Tensor) -> Tensor:
    """A 32-bit number, held in an int64, whose bits all depend on all bits of another."""
    number = number & _LOW
    for shift, prime in zip((16, 15), _PRIMES, strict=True):
        number = ((number ^ (number >> shift)) * prime) & _LOW
    return number ^ (number >> 16)
