# SPDX-License-Identifier: Apache-2.0
"""LayerCompressor: the entries that one layer keeps, and the decisions about them while an image is written."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from . import kernels
from .budgets import ImagePlan
from .chunk import attend_chunk
from .observer import Observer
from .pieces import Allocation, Allocator, Observed, Schedule, Scorer, Selector
from .ragged import RaggedKV
from .registry import Method

_T = TypeVar("_T")


class LayerCompressor:
    """Takes over after the prompt's attention: holds the entries, attends over them, and evicts on schedule.

    The condition is the prompt (and what comes before the image); its entries have the lowest positions and stay.

    Args:
        method: with all four pieces.
        plan: budget and row.
        keys, values: [B, G, T, D] of the prompt.
        visible: [B, T] bool, False for padding, which gets no entry.
        row_prompt: real prompt tokens of each row, on the host.
    """

    def __init__(
        self, method: Method, plan: ImagePlan, keys: Tensor, values: Tensor, visible: Tensor, row_prompt: list[int]
    ) -> None:
        self.plan = plan
        self.scorer: Scorer = _piece(method.scorer)
        self.allocator: Allocator = _piece(method.allocator)
        self.selector: Selector = _piece(method.selector)
        self.schedule: Schedule = _piece(method.schedule)
        self.kv_heads = keys.shape[1]
        self.decoded = -plan.start
        """Image tokens so far; negative while tokens before the image are decoded."""
        self.in_prompt = True
        self.allocation: Allocation | None = None
        self.observer = Observer()
        self.row_condition = [count + plan.start for count in row_prompt]
        self.condition = visible.sum(-1, dtype=torch.int32) + plan.start  # [B]
        self.row_seen = torch.zeros_like(self.condition)  # [B], real tokens so far
        self.store = RaggedKV.empty(
            *self._capacity(), keys.shape[-1], dtype=keys.dtype, with_mass=self.scorer.needs_attention
        )
        self._write(keys, values, visible)
        self.nbytes_peak = self.nbytes

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One token per row: store it, attend, and evict if a row has ended.

        Args:
            query: [B, H, 1, D]; keys, values: [B, G, 1, D].
            scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

        Returns:
            [B, 1, H, D].
        """
        store = self.store
        self.in_prompt = False
        store.max_length += 1
        output = kernels.append_decode(
            query[:, :, 0],
            keys[:, :, 0],
            values[:, :, 0],
            self.row_seen,
            store.keys,
            store.values,
            store.positions,
            store.start,
            store.length,
            scale=scale,
            max_length=store.max_length,
            softcap=softcap,
            sinks=sinks,
            mass=store.mass,
        )
        self.row_seen += 1
        self._advance(query, scale)
        return output[:, None]

    def append(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Several tokens at once: attend over store and chunk, then evict. Before decoding they belong to the prompt.

        Args:
            query: [B, H, T, D]; keys, values: [B, G, T, D].
            visible: [B, T] bool, False for padding.
            scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

        Returns:
            [B, T, H, D].
        """
        tokens = query.shape[2]
        if self.in_prompt:
            counts = visible.sum(-1, dtype=torch.int32)
            self.condition = self.condition + counts
            self.row_condition = [old + new for old, new in zip(self.row_condition, counts.tolist(), strict=True)]
        first = self.row_seen.clone()
        self.store = self.store.regroup(
            self.store.capacity + tokens,
            [slots + tokens * self.kv_heads for slots in self.store.row_slots],
            max_length=self.store.max_length,
        )
        self._write(keys, values, visible)
        # Padding sees nothing, and nothing sees it: position -1 comes before every entry.
        positions = torch.where(visible, first[:, None] + visible.cumsum(-1) - 1, -1).to(torch.int32)  # [B, T]
        output = attend_chunk(query, positions, self.store, scale=scale, softcap=softcap, sinks=sinks)
        if not self.in_prompt:
            self._add_chunk_mass(query, positions, scale)
            self._advance(query, scale, visible)
        self.store = self.store.regroup(*self._capacity(), max_length=self.store.max_length)
        return output

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens.

        Raises:
            ValueError: once entries were evicted, or for more tokens than follow the prompt.
        """
        if self.allocation is not None:
            raise ValueError("entries were evicted, so the cache cannot be cropped; crop before the first eviction")
        after_prompt = self.decoded + self.plan.start
        if self.in_prompt or tokens > after_prompt:
            raise ValueError(
                f"{after_prompt} tokens follow the prompt, so {tokens} cannot be cropped; reset the cache instead"
            )
        self.row_seen = self.row_seen - tokens
        row_slots = torch.tensor(self.store.row_slots, device=self.row_seen.device)
        self.store.evict(self.store.positions >= torch.repeat_interleave(self.row_seen, row_slots))
        self.decoded -= tokens
        # What was learnt from the removed queries cannot be taken out of a sum; the next ones start anew.
        self.observer = Observer()

    def select_rows(self, rows: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held; `rows` is [B'] int64."""
        host = rows.tolist()
        self.store = self.store.select_rows(rows)
        self.row_condition = [self.row_condition[row] for row in host]
        self.condition, self.row_seen = self.condition[rows], self.row_seen[rows]
        self.observer.select_rows(rows)
        if self.allocation is not None:
            self.allocation = replace(
                self.allocation,
                row_totals=[self.allocation.row_totals[row] for row in host],
                **{name: tensor[rows] for name, tensor in _tensor_fields(self.allocation).items()},  # type: ignore[arg-type]
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        allocation = [] if self.allocation is None else list(_tensor_fields(self.allocation).values())
        return [*self.store.tensors, self.condition, self.row_seen, *self.observer.tensors, *allocation]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _write(self, keys: Tensor, values: Tensor, visible: Tensor) -> None:
        self.store.append_chunk(keys, values, visible, self.row_seen)
        self.row_seen += visible.sum(-1, dtype=torch.int32)

    def _add_chunk_mass(self, query: Tensor, positions: Tensor, scale: float) -> None:
        """Decoding adds up attention as it goes; a chunk adds its own here."""
        store = self.store
        if store.mass is None:
            return
        mean = kernels.window_mass(
            query.transpose(1, 2), positions, store.keys, store.positions, store.start, store.length, scale=scale
        )
        store.mass += mean.to(store.mass.dtype) * (query.shape[2] * (query.shape[1] // self.kv_heads))

    def _advance(self, query: Tensor, scale: float, visible: Tensor | None = None) -> None:
        """Count the tokens, keep what the next decision needs of their queries, and decide if it is due."""
        before, self.decoded = self.decoded, self.decoded + query.shape[2]
        until_first = self.schedule.first(self.plan) - self.decoded
        allocated = self.observer.watch(
            query,
            self.plan,
            until_first=until_first,
            mean=self.scorer.needs_mean_query,
            last=0 if self.allocation is not None else self.allocator.queries_needed(self.plan),
            visible=visible,
        )
        if allocated:
            self._track_peak()
        if self.schedule.due(before, self.decoded, self.plan):
            self._evict(scale)
        elif until_first == self.plan.row and self.store.mass is not None:
            # The row before the first eviction decides it, as every later row decides its own.
            self.store.mass.zero_()

    def _evict(self, scale: float) -> None:
        store, room = self.store, self._room
        observed = Observed(
            store=store,
            plan=self.plan,
            condition=self.condition,
            seen=self.row_seen,
            scale=scale,
            mean_query=self.observer.mean_query,
            queries=self.observer.queries,
            attention=store.mass,
        )
        grouping = self.allocation is None
        allocation = self.allocation or self.allocator.allocate(observed)
        self.allocation = allocation
        victims = self.selector.victims(observed, allocation, self.scorer.score_entries(observed))
        bound = max(self.row_condition) + allocation.largest
        if grouping and (allocation.local is not None or room != self.plan.budget + self.plan.row):
            self.store = store.regroup(*self._capacity(), max_length=bound, keep=~victims)
        else:
            store.evict(victims)
            store.max_length = bound
        if self.store.mass is not None:
            self.store.mass.zero_()
        self.observer.clear()
        self._track_peak()

    @property
    def _room(self) -> int:
        """Image entries that each region has room for before the first eviction."""
        first = self.schedule.first(self.plan)
        if self.allocator.queries_needed(self.plan):
            return first  # the grouping moves everything anyway
        return max(first, self.plan.budget + self.plan.row)

    def _capacity(self) -> tuple[Tensor, list[int]]:
        """Slots of every region, [B, G] int32, and their sums per row: the condition, what is kept, and one row."""
        condition, row = self.condition[:, None], self.plan.row
        if self.allocation is None:
            capacity = (condition + self._room).expand(-1, self.kv_heads).contiguous()
            return capacity, [self.kv_heads * (count + self._room) for count in self.row_condition]
        return condition + self.allocation.targets + row, [
            self.kv_heads * (count + row) + total
            for count, total in zip(self.row_condition, self.allocation.row_totals, strict=True)
        ]

    def _track_peak(self) -> None:
        self.nbytes_peak = max(self.nbytes_peak, self.nbytes)


def _piece(piece: _T | None) -> _T:
    if piece is None:
        raise ValueError("a method without scorer, allocator, selector and schedule compresses nothing")
    return piece


def _tensor_fields(allocation: Allocation) -> dict[str, Tensor]:
    values = {field.name: getattr(allocation, field.name) for field in fields(allocation)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
