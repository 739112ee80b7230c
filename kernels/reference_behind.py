# SPDX-License-Identifier: Apache-2.0
"""How much every query attends to what lies behind its own window, in plain torch (shapes: `reference`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_scores import accumulation_dtype, capped, regions

_QUERIES_AT_ONCE = 512
"""Bounds the logits in memory, as in `reference_scores`."""


def check_power(power: int) -> None:
    """Refuse a power that `attention_behind` does not know.

    Raises:
        ValueError: `power` is neither 1 nor 2.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 (the attention itself) or 2 (its squares), got {power!r}")


def attention_behind(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    window: Tensor,
    *,
    scale: float,
    power: int = 1,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that a query gives to what lies behind its own window, the mean over the queries.

    A query's softmax runs over all slots whose position is at most its own, and its weights are averaged over the
    group's query heads. Of these, raised to `power`, those of positions `first_position .. query position - window` are
    summed. With `power` 2 a query that finds one far entry counts for more than one that looks at many.

    Args:
        queries: [B, Q, H, D].
        query_positions: [B, Q] int32, -1 for a pad query, which is neither looked at nor counted.
        window: [B] int32, tokens, the query's own with them, that do not count.
        power: 1 or 2.
        first_position: [B] int32, positions below it do not count, though the softmax has them; None for 0.
        softcap: if > 0, logits become `softcap * tanh(logit / softcap)`.
        sinks: [H], one extra logit per query head that takes part in the softmax and counts nowhere.

    Returns:
        [B, G] float32 (float64 for float64 input) in [0, 1]; 0 for an empty region or a row without queries.

    Raises:
        ValueError: another `power`.
    """
    check_power(power)
    group = queries.shape[2] // start.shape[1]
    dtype = accumulation_dtype(queries.dtype)
    real = query_positions >= 0  # [B, Q]
    total = torch.zeros(start.shape, dtype=torch.float64, device=keys.device)
    for b, g, slots in regions(start, length):
        own_queries = queries[b, real[b], g * group : (g + 1) * group].to(dtype)  # [Q, R, D]
        own_positions = query_positions[b, real[b]][:, None]  # [Q, 1]
        for q in range(0, len(own_queries), _QUERIES_AT_ONCE):
            some = slice(q, q + _QUERIES_AT_ONCE)
            newest, position = own_positions[some], positions[slots][None]  # [Q, 1], [1, n]
            logits = capped(own_queries[some] @ keys[slots].to(dtype).T * scale, softcap)  # [Q, R, n]
            unseen = (position > newest)[:, None]  # [Q, 1, n]
            logits = logits.masked_fill(unseen, float("-inf"))
            if sinks is not None:
                sink = sinks[g * group : (g + 1) * group].to(dtype).expand(len(logits), group)[..., None]  # [Q, R, 1]
                logits = torch.cat([logits, sink], -1)
            # A query that sees nothing has no softmax.
            weights = logits.softmax(-1)[..., : position.shape[1]].masked_fill(unseen, 0.0).mean(1)  # [Q, n]
            behind = position <= newest - window[b]  # [Q, n]
            if first_position is not None:
                behind &= position >= first_position[b]
            total[b, g] += weights.double().where(behind, 0.0).pow(power).sum()
    return (total / real.sum(-1, keepdim=True).clamp(min=1)).to(dtype)
