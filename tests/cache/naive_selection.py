# SPDX-License-Identifier: Apache-2.0
"""Which entries the papers' formulas keep, written with plain loops over the full attention maps of a stock model.

Nothing here knows the library. A map is [H, T, T]: row q is the softmax of query q over all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Observation:
    """One prompt as the stock model sees it: for every layer the maps [H, T, T] and the keys [G, T, D]."""

    maps: list[Tensor]
    keys: list[Tensor]

    @property
    def tokens(self) -> int:
        return self.maps[0].shape[-1]

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[0]

    def group(self, layer: int, head: int) -> Tensor:
        """The maps of the query heads that share a KV head."""
        size = self.maps[layer].shape[0] // self.kv_heads
        return self.maps[layer][head * size : (head + 1) * size]


def observe(model: Any, ids: Tensor) -> Observation:
    """Run the model with eager attention over one row of tokens, [1, T]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            output = model(ids, past_key_values=cache, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return Observation([layer[0] for layer in output.attentions], [layer.keys[0] for layer in cache.layers])


def sinks_and_window(budget: int, tokens: int, *, sinks: int = 4, window: int = 32) -> tuple[int, int]:
    """How many entries are protected at the beginning and at the end."""
    first = min(sinks, budget // 4)
    return first, min(window, (budget - first) // 2)


def best(scores: Sequence[float], count: int, first: int, last: int) -> set[int]:
    """The protected entries and the `count` best of the others; of equal scores the newer stays."""
    tokens = len(scores)
    protected = set(range(first)) | set(range(tokens - last, tokens))
    others = sorted((position for position in range(first, tokens - last)), key=lambda at: (scores[at], at))
    return protected | set(others[len(others) - count :] if count else [])


def maximum_of_neighbours(values: Sequence[float], pool: int) -> list[float]:
    half = pool // 2
    return [max(values[max(at - half, 0) : at + half + 1]) for at in range(len(values))]


def snapkv_scores(seen: Observation, layer: int, head: int, window: int = 32, pool: int = 7) -> list[float]:
    """Mean attention of the last queries over the group, then the best of its neighbours."""
    maps = seen.group(layer, head)
    looked = min(window, seen.tokens)
    mass = [
        sum(float(maps[h, q, at]) for h in range(len(maps)) for q in range(seen.tokens - looked, seen.tokens))
        for at in range(seen.tokens)
    ]
    return maximum_of_neighbours(mass, pool)


def tova_scores(seen: Observation, layer: int) -> list[float]:
    """Attention of the last query, mean over all heads of the layer."""
    maps = seen.maps[layer]
    return [sum(float(maps[h, -1, at]) for h in range(len(maps))) / len(maps) for at in range(seen.tokens)]


def knorm_scores(seen: Observation, layer: int, head: int) -> list[float]:
    """Keys of small norm are attended to much."""
    return [-float(key.norm()) for key in seen.keys[layer][head]]


def adakv_counts(scores: Sequence[Sequence[float]], budget: int, first: int, last: int, uniform: float) -> list[int]:
    """Entries that each head may choose: the layer's best over all heads decide, and a share is the same for all.

    Args:
        scores: per head, per token.
        budget: mean entries per head, protected ones included.
        first, last: protected entries.
        uniform: the share that is divided evenly.
    """
    each = budget - first - last
    flat = [
        (score, at, head)
        for head, row in enumerate(scores)
        for at, score in enumerate(row)
        if first <= at < len(row) - last
    ]
    flat.sort(key=lambda entry: entry[0], reverse=True)
    won = [0] * len(scores)
    for _, _, head in flat[: each * len(scores)]:
        won[head] += 1
    exact = [(1 - uniform) * count + uniform * each for count in won]
    counts = [int(share + 1e-9) for share in exact]
    remainders = sorted(range(len(counts)), key=lambda head: (counts[head] - exact[head], head))
    for head in remainders[: each * len(scores) - sum(counts)]:
        counts[head] += 1
    return counts
