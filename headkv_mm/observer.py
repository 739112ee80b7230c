# SPDX-License-Identifier: Apache-2.0
"""Observer: what a layer remembers of its queries between two decisions, and no more than that."""

from __future__ import annotations

import torch
from torch import Tensor


class Observer:
    """A running sum of queries for the scorer, and the last queries for the allocator.

    Both are taken only when they can still matter: during the step before a decision, and the last queries only where
    somebody asks for them.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [B, H, D] float32
        self._count = 0
        self._last: Tensor | None = None  # [B, Q, H, D]
        self._filled = 0

    @property
    def mean_query(self) -> Tensor | None:
        """[B, H, D] float32, the mean query since the last decision."""
        return None if self._sum is None else self._sum / max(self._count, 1)

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
        step: int,
        until_due: int,
        mean: bool,
        last: int,
        visible: Tensor | None = None,
    ) -> bool:
        """Look at new queries.

        Args:
            query: [B, H, T, D].
            step: tokens between two decisions.
            until_due: tokens left until the next decision, after these.
            mean: the mean query is needed.
            last: how many of the last queries are needed.
            visible: [B, T] bool, False for padding; None if there is none.

        Returns:
            True if memory was allocated.
        """
        before = len(self.tensors)
        tokens = query.shape[2]
        if mean and until_due < step:
            seen = query if visible is None else query * visible[:, None, :, None]
            total = (seen[:, :, 0] if tokens == 1 else seen.sum(2)).float()
            self._sum = total.clone() if self._sum is None else self._sum.add_(total)
            self._count += tokens
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
        if self._sum is not None:
            self._sum.zero_()
        self._count = 0
        self._last, self._filled = None, 0

    def copy(self) -> Observer:
        """The same content with tensors of its own."""
        twin = Observer()
        twin._sum = None if self._sum is None else self._sum.clone()
        twin._last = None if self._last is None else self._last.clone()
        twin._count, twin._filled = self._count, self._filled
        return twin

    def select_rows(self, rows: Tensor) -> None:
        """Take, repeat or reorder rows; `rows` is [B'] int64."""
        self._sum = None if self._sum is None else self._sum[rows]
        self._last = None if self._last is None else self._last[rows]
