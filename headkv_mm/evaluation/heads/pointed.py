# SPDX-License-Identifier: Apache-2.0
"""How sharply single queries attend to what lies behind their own window, as the "pointed" allocator asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv_mm.evaluation.heads.attending import MOST_QUERIES, RecordedRow

TEXT_QUERIES, TEXT_WINDOW = 64, 8
"""Of a text: newest queries that are asked, and tokens of each one's own window. Of an image both are a row."""


@dataclass(frozen=True)
class Behind:
    """Which queries are asked, and what lies behind them.

    Attributes:
        queries: newest ones.
        window: newest tokens that do not count, the query's own among them; every query has its own window.
        first: entries at the beginning that do not count either: the condition, or a text's sinks.
    """

    queries: int
    window: int
    first: int


def pointed_attention(layer: RecordedRow, end: int, behind: Behind) -> Tensor:
    """The sum over the entries of the squares of a query's attention, mean over the queries before `end`, [G] float32.

    Attention is averaged over the group before it is squared, see `headkv_mm.allocators.Proportional`.
    """
    begin = max(end - behind.queries, 0)
    total = layer.keys.new_zeros(layer.keys.shape[0])
    for start in range(begin, end, MOST_QUERIES):
        stop = min(start + MOST_QUERIES, end)
        attention = layer.attention(start, stop).mean(1)  # [G, Q, stop]
        columns = torch.arange(stop, device=attention.device)
        far = columns <= columns[start:, None] - behind.window  # [Q, stop]
        far &= columns >= behind.first
        total += attention.masked_fill(~far, 0.0).square().sum((1, 2))
    return total / (end - begin)
