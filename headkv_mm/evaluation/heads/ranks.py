# SPDX-License-Identifier: Apache-2.0
"""Rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(left: Tensor, right: Tensor) -> float | None:
    """Spearman's rank correlation of two [K] tensors; equal values share their mean rank.

    Returns:
        A number in [-1, 1]; 0 if `left` is constant, since it then ranks nothing; None if `right` is, since there is
        nothing to rank.
    """
    first, second = _centred_ranks(left), _centred_ranks(right)
    if not bool(second.any()):
        return None
    norm = float(first.norm() * second.norm())
    return float(first @ second) / norm if norm else 0.0


def _centred_ranks(values: Tensor) -> Tensor:
    smaller = (values[None] < values[:, None]).sum(-1)
    not_larger = (values[None] <= values[:, None]).sum(-1)
    ranks = (smaller + not_larger).double() / 2
    return ranks - ranks.mean()


def spearman_within(left: Tensor, right: Tensor) -> float | None:
    """The same inside layers: mean over those that have something to rank.

    Args:
        left, right: [L, G].
    """
    found = [spearman(one, other) for one, other in zip(left, right, strict=True)]
    known = [value for value in found if value is not None]
    return float(torch.tensor(known).double().mean()) if known else None
