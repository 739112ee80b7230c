# SPDX-License-Identifier: Apache-2.0
"""What the scoring kernels compute, in plain torch: they read the cache and change nothing (shapes: `reference`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

_QUERIES_AT_ONCE = 512
"""Bounds the logits in memory, so that a whole prompt can be the window."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def regions(start: Tensor, length: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield (row, head, slots) for every region that holds something."""
    starts, lengths = start.tolist(), length.tolist()
    for b in range(len(starts)):
        for g in range(len(starts[b])):
            if lengths[b][g] > 0:
                yield b, g, slice(starts[b][g], starts[b][g] + lengths[b][g])


def capped(logits: Tensor, softcap: float) -> Tensor:
    """`softcap * tanh(logits / softcap)`, or the logits themselves for 0."""
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def window_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean attention of a window of queries, per slot.

    Each query's softmax runs over the slots it may see: positions at most its own and, where `first_position` is given,
    at least that (so that condition tokens stay out of the mass). Means run over the window and the group, so the
    result sums to one over a region that every query can see something of, sinks aside. A query that sees nothing adds
    nothing and is counted in the mean all the same: mark a pad query with position -1.

    Args:
        queries: [B, Q, H, D]. Q may be the whole prompt: memory grows with Q + N, not with their product.
        query_positions: [B, Q] int32.
        first_position: [B] int32 or None.
        softcap: if > 0, logits become `softcap * tanh(logit / softcap)`.
        sinks: [H], one extra logit per query head that takes part in the softmax and receives its share unseen.

    Returns:
        [N] float32 (float64 for float64 input), zero outside the regions.
    """
    _, window, heads, _ = queries.shape
    group = heads // start.shape[1]
    dtype = accumulation_dtype(queries.dtype)
    mass = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    for b, g, slots in regions(start, length):
        h = slice(g * group, (g + 1) * group)
        region_keys = keys[slots].to(dtype)
        for q in range(0, window, _QUERIES_AT_ONCE):
            some = slice(q, q + _QUERIES_AT_ONCE)
            logits = capped(queries[b, some, h].to(dtype) @ region_keys.T * scale, softcap)  # [Q, R, n]
            visible = positions[slots][None, :] <= query_positions[b, some][:, None]  # [Q, n]
            if first_position is not None:
                visible &= (positions[slots] >= first_position[b])[None, :]
            logits = logits.masked_fill(~visible[:, None], float("-inf"))
            if sinks is not None:
                sink = sinks[h].to(dtype).expand(len(logits), group)[..., None]  # [Q, R, 1]
                logits = torch.cat([logits, sink], -1)
            weights = logits.softmax(-1).nan_to_num(0.0)[..., : len(region_keys)]
            mass[slots] += weights.sum((0, 1)) / (window * group)
    return mass


def check_pool(pool: int, pooling: str) -> None:
    """Refuse a pooling that `window_scores` does not know.

    Raises:
        ValueError: `pool` is not a positive odd number, or `pooling` is neither "max" nor "mean".
    """
    if pool < 1 or pool % 2 == 0:
        raise ValueError(
            f"pool must be a positive odd number of neighbouring slots, got {pool}: choose 1, 3, 5, 7, ..."
        )
    if pooling not in ("max", "mean"):
        raise ValueError(f'pooling must be "max" or "mean", got {pooling!r}')


def window_scores(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    pool: int = 1,
    pooling: str = "max",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`window_mass`, pooled over neighbouring slots: the prefill score of SnapKV (arXiv 2404.14469) and its kin.

    The score of a slot is the maximum or the mean of the mass in the `pool` slots around it, in slot order and inside
    its region: the caller keeps slots in position order where neighbours should be neighbours in the text. At a border
    only the slots that exist take part, and the mean divides by their number.

    Args:
        queries, query_positions, softcap, sinks: as in `window_mass`.
        pool: odd; 1 for no pooling.
        pooling: "max" or "mean".

    Returns:
        [N] float32 (float64 for float64 input), zero outside the regions.

    Raises:
        ValueError: another `pool` or `pooling`.
    """
    check_pool(pool, pooling)
    scores = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, softcap=softcap, sinks=sinks
    )
    if pool > 1:
        for _, _, slots in regions(start, length):
            mass = scores[slots][None]  # [1, n]
            if pooling == "max":
                scores[slots] = max_pool1d(mass, pool, stride=1, padding=pool // 2)[0]
            else:
                scores[slots] = avg_pool1d(mass, pool, stride=1, padding=pool // 2, count_include_pad=False)[0]
    return scores


def window_norms(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    value_norms: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """How much of a layer's output a slot carries for a window of queries (arXiv 2605.07234).

    Per query head the 2-norm, over the window, of the attention that the slot gets, times the norm of what the head
    adds to the output for it; the mean over the group.

    Args:
        queries, query_positions, softcap, sinks: as in `window_mass`.
        value_norms: [N, R] float32 (float64 for float64 input), R = H / G: the norm of the slot's value after the
            output projection of each head of the group.

    Returns:
        [N] float32 (float64 for float64 input), zero outside the regions.
    """
    _, window, heads, _ = queries.shape
    group = heads // start.shape[1]
    dtype = accumulation_dtype(queries.dtype)
    norms = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    for b, g, slots in regions(start, length):
        squares = torch.zeros(group, slots.stop - slots.start, dtype=dtype, device=keys.device)  # [R, n]
        for q in range(0, window, _QUERIES_AT_ONCE):
            some = slice(q, q + _QUERIES_AT_ONCE)
            h = slice(g * group, (g + 1) * group)
            logits = capped(queries[b, some, h].to(dtype) @ keys[slots].to(dtype).T * scale, softcap)  # [Q, R, n]
            visible = positions[slots][None, :] <= query_positions[b, some][:, None]  # [Q, n]
            logits = logits.masked_fill(~visible[:, None], float("-inf"))
            if sinks is not None:
                sink = sinks[h].to(dtype).expand(len(logits), group)[..., None]  # [Q, R, 1]
                logits = torch.cat([logits, sink], -1)
            weights = logits.softmax(-1).nan_to_num(0.0)[..., : squares.shape[1]]
            squares += weights.square().sum(0)
        norms[slots] = (squares.sqrt() * value_norms[slots].to(dtype).T).mean(0)
    return norms


def tokens_needed(mass: Tensor, positions: Tensor, start: Tensor, length: Tensor, *, tau: float) -> Tensor:
    """How many of the newest entries hold a share `tau` of each region's mass.

    Mass is accumulated backward from the newest position (arXiv 2605.20600, head grouping).

    Returns:
        [B, G] int32; 0 for an empty region or one without mass.
    """
    needed = torch.zeros_like(start)
    for b, g, slots in regions(start, length):
        newest_first = positions[slots].argsort(descending=True)
        accumulated = mass[slots][newest_first].cumsum(0)
        total = accumulated[-1]
        if total > 0:
            # Entries before the target, plus the one that reaches it; the clamp guards against rounding.
            needed[b, g] = min(int((accumulated < tau * total).sum()) + 1, len(accumulated))
    return needed


def head_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    tau: float,
    first_position: Tensor | None = None,
) -> Tensor:
    """Tokens needed, counted backward, for a share `tau` of the window's attention: `window_mass` + `tokens_needed`.

    Returns:
        [B, G] int32.
    """
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, first_position=first_position
    )
    return tokens_needed(mass, positions, start, length, tau=tau)


def mean_query_logits(mean_query: Tensor, keys: Tensor, start: Tensor, length: Tensor, *, scale: float) -> Tensor:
    """Logit of the mean query for every slot, averaged over the group.

    The mean of logits over queries is the logit of the mean query, so a running mean is all that must be stored.

    Args:
        mean_query: [B, H, D], float32 or wider.

    Returns:
        [N] float32 (float64 for float64 input), zero outside the regions.
    """
    heads = mean_query.shape[1]
    group = heads // start.shape[1]
    dtype = accumulation_dtype(mean_query.dtype)
    logits = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    for b, g, slots in regions(start, length):
        q = mean_query[b, g * group : (g + 1) * group].to(dtype).mean(0)  # [D]
        logits[slots] = keys[slots].to(dtype) @ q * scale
    return logits
