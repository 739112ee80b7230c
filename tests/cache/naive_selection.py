# SPDX-License-Identifier: Apache-2.0
"""Which entries the papers' formulas keep, written with plain loops over the full attention maps of a stock model.

Nothing here knows the library. Row q of a map is the softmax of query q over all keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Map = list[list[float]]


@dataclass
class Observation:
    """One prompt as the stock model sees it: for every layer the maps [H][T][T] and the keys [G, T, D]."""

    maps: list[list[Map]]
    keys: list[Tensor]

    @property
    def tokens(self) -> int:
        return len(self.maps[0][0])

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[0]

    def group(self, layer: int, head: int) -> list[Map]:
        """The maps of the query heads that share a KV head."""
        size = len(self.maps[layer]) // self.kv_heads
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
    return Observation([layer[0].tolist() for layer in output.attentions], [layer.keys[0] for layer in cache.layers])


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


def single(values: Sequence[float]) -> list[float]:
    """Rounded to single precision, which is what scores are ranked in: what is equal there is a tie."""
    rounded: list[float] = torch.tensor(values, dtype=torch.float64).float().tolist()
    return rounded


def snapkv_scores(seen: Observation, layer: int, head: int, window: int = 32, pool: int = 7) -> list[float]:
    """Mean attention of the last queries over the group, then the best of its neighbours."""
    maps = seen.group(layer, head)
    looked = min(window, seen.tokens)
    mass = [
        sum(maps[h][q][at] for h in range(len(maps)) for q in range(seen.tokens - looked, seen.tokens))
        for at in range(seen.tokens)
    ]
    return maximum_of_neighbours(single([each / (looked * len(maps)) for each in mass]), pool)


def tova_scores(seen: Observation, layer: int) -> list[float]:
    """Attention of the last query, mean over all heads of the layer."""
    maps = seen.maps[layer]
    return single([sum(maps[h][-1][at] for h in range(len(maps))) / len(maps) for at in range(seen.tokens)])


def knorm_scores(seen: Observation, layer: int, head: int) -> list[float]:
    """Keys of small norm are attended to much; norms that agree in 14 bits count as equal."""
    parts = [math.frexp(float(key.norm())) for key in seen.keys[layer][head]]
    return [-math.ldexp(round(mantissa * 2**14), exponent) for mantissa, exponent in parts]


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
    flat.sort(key=lambda entry: (-entry[0], -entry[1], entry[2]))  # of equal ones the newer, then the first head's
    won = [0] * len(scores)
    for _, _, head in flat[: each * len(scores)]:
        won[head] += 1
    share = Fraction(str(uniform))
    exact = [(1 - share) * count + share * each for count in won]
    counts = [int(wanted) for wanted in exact]
    remainders = sorted(range(len(counts)), key=lambda head: (counts[head] - exact[head], head))
    for head in remainders[: each * len(scores) - sum(counts)]:
        counts[head] += 1
    return counts


def pyramid_line(budget: int, available: int, layers: int, beta: float) -> list[float]:
    """What each layer may choose, falling linearly: the last a `beta`-th of the mean, unless the first holds all."""
    first = min(2 * budget - budget / beta, max(available, budget))
    last = 2 * budget - first
    return [first + (last - first) * layer / (layers - 1) for layer in range(layers)]
