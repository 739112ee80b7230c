# SPDX-License-Identifier: Apache-2.0
"""Dividing the same number of entries among heads by what is predicted of them, and what that retains."""

from __future__ import annotations

import torch
from torch import Tensor

from headkv_mm.allocators.shares import apportioned
from headkv_mm.budgets import Budget

SCOPES = ("model", "layer")
"""Entries move among all heads of the model, or among those of a layer."""


def mean_entries(budget: Budget, entries: int, limit: int) -> int:
    """Entries per head of a budget.

    Args:
        budget: a share of `entries`, or a number.
        entries: of a head with a full cache.
        limit: the most that a head can hold of them when something leaves.
    """
    wanted = round(budget * entries) if isinstance(budget, float) else int(budget)
    return max(1, min(wanted, limit))


def in_scope(values: Tensor, scope: str) -> Tensor:
    """[L, G, ...] as [pools, heads, ...]: one pool of all heads, or one per layer."""
    return values.flatten(0, 1)[None] if scope == "model" else values


def proportional(weights: Tensor, *, mean: int, floor: int, limit: int) -> Tensor:
    """A floor for every head, and the rest in proportion.

    Args:
        weights: [pools, heads], not negative.
        mean: entries per head.
        floor: entries of every head, at most `mean`.
        limit: the most that a head can hold, at least `mean`.

    Returns:
        [pools, heads] int32; every pool sums to `mean` times its heads.
    """
    heads = weights.shape[-1]
    total = torch.full((*weights.shape[:-1], 1), (mean - floor) * heads, device=weights.device)
    return floor + apportioned(weights, total, torch.full_like(total, limit - floor).expand(weights.shape))


def water_filled(gains: Tensor, *, mean: int, floor: int) -> Tensor:
    """A floor for every head, and then always the entry that gains most: the best there is for falling gains.

    Args:
        gains: [pools, heads, N], falling along the last dimension.
        mean: entries per head, at most N.
        floor: entries of every head, at most `mean`.

    Returns:
        [pools, heads] int64; every pool sums to `mean` times its heads. Of equal gains the head with fewer entries is
        served first.
    """
    heads = gains.shape[1]
    rest = gains[..., floor:].transpose(1, 2).flatten(1)  # [pools, (N - floor) * heads], by entry and then by head
    chosen = rest.argsort(dim=-1, descending=True, stable=True)[:, : (mean - floor) * heads] % heads
    counts = torch.zeros(gains.shape[:2], dtype=torch.int64, device=gains.device)
    return floor + counts.scatter_add_(1, chosen, torch.ones_like(chosen))


def retained(gains: Tensor, targets: Tensor) -> float:
    """Share of all attention that is retained where every head keeps its best entries, mean over the heads.

    Args:
        gains: [pools, heads, N] of `needs.future_gains`.
        targets: [pools, heads] entries.
    """
    return 1.0 - float(_lost(gains).gather(-1, targets.long()[..., None]).mean())


def retained_if_shuffled(gains: Tensor, targets: Tensor) -> float:
    """The same, mean over all ways to give the targets to the heads of a pool."""
    heads = gains.shape[1]
    every = targets.long()[:, None].expand(-1, heads, -1)  # each head with each target
    return 1.0 - float(_lost(gains).gather(-1, every).mean())


def _lost(gains: Tensor) -> Tensor:
    """[pools, heads, N + 1] float64: attention lost with 0 to N entries."""
    return torch.nn.functional.pad(gains.double().flip(-1).cumsum(-1).flip(-1), (0, 1))
