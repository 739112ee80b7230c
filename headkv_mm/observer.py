# SPDX-License-Identifier: Apache-2.0
"""Observer: what a layer remembers of its queries between two decisions, and no more than that."""

from __future__ import annotations

import torch
from torch import Tensor


class Observer:
    """A running sum of queries for the scorer, and the last queries for the allocator.

    Both are taken only when they can still matter: shortly before a decision, and only where somebody asks for them.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [B, H, D] float32
        self.counts: list[int] = []
        """How many queries of each row are in the sum; empty for none."""
        self._last: Tensor | None = None  # [B, Q, H, D]
        self._filled = 0

    @property
    def mean_query(self) -> Tensor | None:
        """[B, H, D] float32, the mean query since the last decision."""
        if self._sum is None:
            return None
        if len(set(self.counts)) < 2:
            return self._sum / max([1, *self.counts])
        return self._sum / self._sum.new_tensor(self.counts).clamp(min=1)[:, None, None]

    @property
    def queries(self) -> Tensor | None:
        """[B, Q, H, D], the last queries, oldest first."""
        return None if self._last is None else self._last[:, : self._filled]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [tensor for tensor in (self._sum, self._last) if tensor is not None]

    def watch(
        self,
        query: Tensor,
        *,
        window: int,
        until_due: int,
        mean: bool,
        last: int,
        visible: Tensor | None = None,
    ) -> bool:
        """Look at new queries.

        Args:
            query: [B, H, T, D].
            window: how many of the last queries before a decision the mean is of.
            until_due: tokens left until the next decision, after these.
            mean: the mean query is needed.
            last: how many of the last queries are needed.
            visible: [B, T] bool, False for padding; None if there is none.

        Returns:
            True if memory was allocated.
        """
        before = len(self.tensors)
        tokens = query.shape[2]
        counted = queries_counted(tokens, until_due=until_due, window=window)
        if counted < tokens and self.counts:  # a long chunk: what came before is no more among the last
            self._forget_sum()
        if mean and counted:
            newest = query[:, :, tokens - counted :].float()
            counts = [counted] * query.shape[0]
            if visible is not None:
                real = visible[:, tokens - counted :]  # [B, T]
                newest, counts = torch.where(real[:, None, :, None], newest, 0.0), real.sum(-1).tolist()
            total = newest[:, :, 0] if counted == 1 else newest.sum(2)
            self._sum = total.clone() if self._sum is None else self._sum.add_(total)
            self.counts = [old + new for old, new in zip(self.counts or [0] * len(counts), counts, strict=True)]
        if last and until_due < last:
            self._remember(query.transpose(1, 2), last)
        return len(self.tensors) > before

    def _remember(self, queries: Tensor, needed: int) -> None:
        batch, tokens, heads, head_dim = queries.shape
        if self._last is None:
            self._last = queries.new_empty(batch, needed, heads, head_dim)
        if self._filled + tokens <= needed:
            self._last[:, self._filled : self._filled + tokens] = queries
            self._filled += tokens
        else:
            kept = torch.cat([self._last[:, : self._filled], queries], dim=1)[:, -needed:]
            self._last.copy_(kept)
            self._filled = needed

    def clear(self) -> None:
        """Forget after a decision. The sum's memory stays for the next row; the last queries are needed no more."""
        self._forget_sum()
        self._last, self._filled = None, 0

    def _forget_sum(self) -> None:
        if self._sum is not None:
            self._sum.zero_()
        self.counts = []

    def copy(self) -> Observer:
        """The same content with tensors of its own."""
        twin = Observer()
        twin._sum = None if self._sum is None else self._sum.clone()
        twin._last = None if self._last is None else self._last.clone()
        twin.counts, twin._filled = list(self.counts), self._filled
        return twin

    def select_rows(self, rows: Tensor) -> None:
        """Take, repeat or reorder rows; `rows` is [B'] int64."""
        self._sum = None if self._sum is None else self._sum[rows]
        self._last = None if self._last is None else self._last[rows]
        self.counts = self.counts and [self.counts[row] for row in rows.tolist()]

    @property
    def query_sum(self) -> Tensor | None:
        """[B, H, D] float32, the sum that `mean_query` is made of; None if nothing was added up."""
        return self._sum if self.counts else None

    def take_up(self, query_sum: Tensor, counts: list[int]) -> None:
        """Go on from a sum of queries, [B, H, D] float32, and how many of each row are in it."""
        self._sum, self.counts = query_sum, counts


def queries_counted(tokens: int, *, until_due: int, window: int) -> int:
    """How many of the newest `tokens` queries are among the last `window` before a decision.

    Args:
        tokens: new queries.
        until_due: tokens left until the decision, after these; a decision that is due already (negative) falls now.
        window: queries.
    """
    return max(min(tokens, window - max(until_due, 0)), 0)
