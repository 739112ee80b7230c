# SPDX-License-Identifier: Apache-2.0
"""Dividing whole entries exactly: largest remainders, limits, and growth in proportion."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(weights: Tensor, total: int | Tensor) -> Tensor:
    """Divide a total among the entries of every row in proportion to whole weights, by largest remainder.

    Args:
        weights: [B, G] int, not negative, at least one of each row positive; the largest times the total must fit an
            int64.
        total: the new sum of every row, or [B, 1] int.

    Returns:
        [B, G] int32; rows sum to exactly `total`. Of equal remainders the first head's is served first. No share is
        more than one away from the exact one.
    """
    old = weights.sum(-1, keepdim=True).long()
    product = weights.long() * total
    base = product // old
    left = total - base.sum(-1, keepdim=True)  # [B, 1], fewer than G
    order = (product % old).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (base + (rank < left)).to(torch.int32)


def apportioned(weights: Tensor, total: Tensor, limit: Tensor) -> Tensor:
    """Divide `total` in proportion to weights, no share above its limit; what is cut off goes to the others.

    Water-filling by rounds: shares above their limit are set to it, the rest is divided again, and at the end whole
    entries are made by largest remainder.

    Args:
        weights: [..., K] float, not negative; all zero counts as all equal.
        total: [..., 1] int, at most the sum of the limits.
        limit: [..., K] int.

    Returns:
        [..., K] int32 whose sums are exactly `total`.
    """
    weights = weights.double().clamp(min=0)
    # Weights next to the smallest number lose their proportions in what follows; a power of two changes no others.
    weights = torch.where(weights.amax(-1, keepdim=True) < 2.0**-400, weights * 2.0**600, weights)
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    # A head without any weight takes what no other can take.
    weights = weights + weights.sum(-1, keepdim=True) * 1e-12
    fixed = torch.zeros_like(weights, dtype=torch.bool)
    share = torch.zeros_like(weights)
    for _ in range(weights.shape[-1]):
        left = total - torch.where(fixed, limit, 0).sum(-1, keepdim=True)
        free = torch.where(fixed, 0.0, weights)
        share = left.clamp(min=0) * free / free.sum(-1, keepdim=True).clamp(min=1e-300)
        over = ~fixed & (share > limit)
        if not bool(over.any()):
            break
        fixed |= over
    share = torch.where(fixed, limit.double(), share)
    base = share.floor().minimum(limit.double()).long()
    # Largest remainders first, never above a limit.
    for _ in range(weights.shape[-1] + 1):
        left = total - base.sum(-1, keepdim=True)
        if not bool((left > 0).any()):
            break
        remainder = torch.where(base < limit, share - base, float("-inf"))
        order = remainder.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        base = base + ((rank < left) & (base < limit))
    return base.to(torch.int32)
