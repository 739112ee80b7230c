# SPDX-License-Identifier: Apache-2.0
"""Scores from the keys alone: no query is looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pieces import Observed, Scorer
from .regions import blocks, entries, norms, region_slots, to_slots

_BLOCK = 1024
_NORM_STEPS = 1 << 14


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Keys of a small norm stay: they are those that are attended to (arXiv 2406.11430).

    The score is `-||k||`, rounded to 14 bits: a token that comes twice has keys that are the same but for their
    rotation, and rounding errors of rotations shall not decide which of them stays. Of equal ones the newer does.
    """

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        mantissa, exponent = torch.frexp(norms(observed.store.keys))
        return -torch.ldexp((mantissa * _NORM_STEPS).round() / _NORM_STEPS, exponent)


@dataclass(frozen=True)
class KeyDifference(Scorer):
    """Keys that differ from the others of their head stay (arXiv 2504.15364, KeyDiff).

    The score is `-cos(k, mean of k' / ||k'|| over the entries k' that the head holds)`.

    Attributes:
        by_value: not in the paper: the score is `(1 - cos) ||v||`, as a value moves the head's output by its size.
    """

    by_value: bool = False

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        store = observed.store
        slots, filled = region_slots(store)  # [B, G, M]
        total = unit_key_sum(observed)
        anchor = normalize(total, dim=-1).float()[:, :, None]  # the mean and the sum point the same way
        likeness = torch.zeros(slots.shape, device=slots.device)
        for block in blocks(slots.shape[-1], _BLOCK):
            unit = normalize(entries(store.keys, slots[..., block], filled[..., block], torch.float32), dim=-1)
            likeness[..., block] = (unit * anchor).sum(-1)
        scores = -likeness
        if self.by_value:
            scores = torch.where(filled, (1 - likeness).clamp(min=0) * norms(store.values)[slots], 0.0)
        return to_slots(scores, slots, filled, store)


def unit_key_sum(observed: Observed) -> Tensor:
    """The sum of k / |k| over the entries that each head holds, [B, G, D] float64."""
    store = observed.store
    slots, filled = region_slots(store)  # [B, G, M]
    # In float64, so that a row's sum does not depend on how far its batch is padded.
    total = torch.zeros(*store.start.shape, store.keys.shape[-1], dtype=torch.float64, device=slots.device)
    for block in blocks(slots.shape[-1], _BLOCK):
        unit = normalize(entries(store.keys, slots[..., block], filled[..., block], torch.float32), dim=-1)
        total += unit.sum(2, dtype=torch.float64)
    return total
