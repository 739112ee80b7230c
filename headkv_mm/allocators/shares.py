# SPDX-License-Identifier: Apache-2.0
"""Dividing whole entries exactly: largest remainders, limits, and growth in proportion."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER_NOTHING = 1e-12
"""Share of the sum of all weights that every weight gets on top: a head without any takes what no other can take."""
_ROUNDING = 1e-9
"""Far above what floating point gets wrong in a share, far below one entry."""


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
    weights = weights * _magnified(weights)
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    weights = weights + weights.sum(-1, keepdim=True) * _NEVER_NOTHING
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


def apportioned_at_most(
    weights: Tensor, total: Tensor, limit: Tensor, *, others: int, heaviest: Tensor | float = float("inf")
) -> Tensor:
    """What `apportioned` can give each of K heads at most, when others join them whose weights are not known yet.

    A share is the smaller of the limit and of level times weight, where the level is what makes the shares sum to
    `total`; heads that join can only lower it, so those to come count as without weight. What every weight gets on top
    grows with them, though: as a function of it a share rises exactly while it is below the mean of the shares that are
    not at the limit, and that mean only grows, so a share first falls and then rises, and is largest at one of the two
    ends: with what is on top now, or with the most that it can become.

    Args:
        weights: [B, K] float, not negative. Those that the heads have in the end may all be smaller by one factor.
        total: [B, 1] int, what all heads divide, those to come included.
        limit: [B, 1] int, of every head, with `total` at most the sum of the limits of all.
        others: how many heads are still to come.
        heaviest: what no weight of these exceeds, [B, 1].

    Returns:
        [B, K] int64. Nothing is read from the device.
    """
    weights = weights.double().clamp(min=0)
    larger = _magnified(weights)
    weights = weights * larger
    held = weights.sum(-1, keepdim=True).clamp(min=1e-290)  # [B, 1]
    # More than this on top makes all weights equal.
    most = (held + others * larger * heaviest if others else held).minimum(held / _NEVER_NOTHING**2)
    shares = [_levelled(weights, top * _NEVER_NOTHING, total, limit, others) for top in (held, most)]
    share = shares[0].maximum(shares[1])  # [B, K]
    return ((share * (1 + _ROUNDING) + _ROUNDING).floor().long() + 1).minimum(limit.long())


def _magnified(weights: Tensor) -> Tensor:
    """What to multiply weights [..., K] with, [..., 1]: those next to the smallest number lose their proportions.

    It is a power of two, which changes nothing else.
    """
    tiny = weights.amax(-1, keepdim=True) < 2.0**-400
    return torch.ones_like(weights[..., :1]).masked_fill(tiny, 2.0**600)


def _levelled(weights: Tensor, top: Tensor, total: Tensor, limit: Tensor, others: int) -> Tensor:
    """Shares [B, K] of heads with `top` [B, 1] on their weights [B, K], beside others with nothing but `top`."""
    weights = weights + top
    everyone = torch.cat([weights, top.expand(-1, others)], dim=1)
    falling = everyone.sort(dim=-1, descending=True).values  # [B, K + others]
    # If the first n heads are at the limit, the others are at the level of what is left.
    left = total - limit * torch.arange(falling.shape[1], device=falling.device)
    level = left.clamp(min=0) / falling.flip(-1).cumsum(-1).flip(-1)
    fits = falling * level <= limit
    first = fits.int().argmax(-1, keepdim=True)
    level = torch.where(fits.any(-1, keepdim=True), level.gather(-1, first), float("inf"))
    return (weights * level).minimum(limit.double())
