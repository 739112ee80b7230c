# SPDX-License-Identifier: Apache-2.0
"""ImageCompressor: the entries that one layer keeps while an image is written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import kernels
from .budgets import ImagePlan
from .chunk import attend_chunk
from .compressor import LayerCompressor
from .model_pool import ModelPool
from .observer import Observer
from .pieces import Allocation, Observed
from .ragged import RaggedKV
from .registry import Pieces
from .schedules import AfterGrouping
from .squared_logits import squared_logits


class ImageCompressor(LayerCompressor):
    """Keeps the condition (the prompt and what comes before the image), and of the image what the method chooses.

    Args:
        pieces: the method's.
        plan: budget and row.
        keys, values: [B, G, T, D] of the prompt.
        visible: [B, T] bool, False for padding, which gets no entry.
        row_prompt: real prompt tokens of each row, on the host.
        pool: where the layers of the cache meet if the allocator compares them.
    """

    plan: ImagePlan

    def __init__(
        self,
        pieces: Pieces,
        plan: ImagePlan,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        row_prompt: list[int],
        pool: ModelPool | None = None,
    ) -> None:
        super().__init__(pieces, plan, keys.shape[1], pool)
        self._waits: tuple[Observed, Tensor] | None = None  # for the other layers
        self.decoded = -plan.start  # image tokens so far; negative while tokens before the image are decoded
        self.in_prompt = True
        self.row_condition = [count + plan.start for count in row_prompt]
        self.condition = visible.sum(-1, dtype=torch.int32) + plan.start  # [B]
        self.seen = torch.zeros_like(self.condition)
        self.row_seen = list(row_prompt)
        self.store = RaggedKV.empty(*self._capacity(), keys.shape[-1], dtype=keys.dtype, with_mass=self.wants_mass)
        self._write(keys, values, visible)
        self._track_peak()

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
        """See `LayerCompressor.decode`; evicts if a row has ended."""
        self.in_prompt = False
        return super().decode(query, keys, values, scale=scale, softcap=softcap, sinks=sinks)

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
        counts = visible.sum(-1).tolist()
        if self.in_prompt:
            self.condition = self.condition + visible.sum(-1, dtype=torch.int32)
            self.row_condition = [old + new for old, new in zip(self.row_condition, counts, strict=True)]
        self.row_seen = [old + new for old, new in zip(self.row_seen, counts, strict=True)]
        first = self.seen.clone()
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
        if self._waits is None:
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
        self._count(-tokens)
        self.store.evict(self.store.positions >= self.seen[self.store.row_of_slots()])
        self.decoded -= tokens
        # What was learnt from the removed queries cannot be taken out of a sum; the next ones start anew.
        self.observer = Observer()
        self._forget()

    def after_decode(self, query: Tensor, scale: float) -> None:
        """Observe the query and evict if a row has ended."""
        self._advance(query, scale)

    def _write(self, keys: Tensor, values: Tensor, visible: Tensor) -> None:
        self.store.append_chunk(keys, values, visible, self.seen)
        self.seen += visible.sum(-1, dtype=torch.int32)

    def _add_chunk_mass(self, query: Tensor, positions: Tensor, scale: float) -> None:
        """Decoding adds up attention, or what the scorer wants, as it goes; a chunk adds its own here."""
        store, window = self.store, self._queries_counted(query.shape[2])
        if store.mass is None or not window:
            return
        if window < query.shape[2]:  # what was added up before is no more of the last queries
            store.mass.zero_()
        if self.pieces.scorer.adds_up == "squared_logits":
            asked = query.transpose(1, 2)[:, -window:]
            store.mass += squared_logits(asked, positions[:, -window:], store, scale=scale)
            return
        mean = kernels.window_mass(
            query.transpose(1, 2)[:, -window:],
            positions[:, -window:],
            store.keys,
            store.positions,
            store.start,
            store.length,
            scale=scale,
        )
        store.mass += mean.to(store.mass.dtype) * (window * (query.shape[1] // self.kv_heads))

    def _advance(self, query: Tensor, scale: float, visible: Tensor | None = None) -> None:
        """Count the tokens, keep what the next decision needs of their queries, and decide if it is due."""
        plan, pieces = self.plan, self.pieces
        before, until_due = self.decoded, self.next_due - self.decoded - query.shape[2]
        undecided = self.allocation is None or self._divides_anew(before, max(self.next_due, before + query.shape[2]))
        self.decoded += query.shape[2]
        allocated = self.observer.watch(
            query,
            window=pieces.scorer.mean_window(plan),
            until_due=until_due,
            mean=pieces.scorer.needs_mean_query,
            last=self._queries_needed(undecided=undecided),
            visible=visible,
        )
        if allocated:
            self._track_peak()
        if pieces.schedule.due(before, self.decoded, plan):
            self._evict(scale, decide=self.allocation is None or self._divides_anew(before, self.decoded))

    def _divides_anew(self, before: int, after: int) -> bool:
        schedule = self.pieces.schedule
        return isinstance(schedule, AfterGrouping) and schedule.divides_anew(before, after, self.plan)

    def _evict(self, scale: float, *, decide: bool) -> None:
        store = self.store
        queries = self.observer.queries
        ages = None if queries is None else torch.arange(queries.shape[1], 0, -1, device=self.seen.device)
        observed = Observed(
            store=store,
            plan=self.plan,
            condition=self.condition,
            seen=self.seen,
            scale=scale,
            row_budgets=[self.plan.budget] * store.rows,
            row_seen=self.row_seen,
            mean_query=self.observer.mean_query,
            query_counts=self.observer.counts,
            queries=queries,
            # The newest query has age 1.
            query_positions=None if ages is None else (self.seen[:, None] - ages).to(torch.int32),
            credit=store.credit,
            added_up=store.mass,
        )
        scores = self.pieces.scorer.score_entries(observed)
        if self.allocation is not None and not decide:
            self._evict_down(observed, self.allocation, scores, move=False)
        elif self.over_layers:
            self._waits = replace(observed, noted=self.model_allocator.note(observed, scores)), scores
            self.pool.wait(self)
        else:
            self._group(observed, self.pieces.allocator.allocate(observed, scores), scores)

    def waiting(self) -> tuple[Observed, Tensor]:
        """See `LayerCompressor.waiting`."""
        if self._waits is None:
            raise RuntimeError("this layer has decided already")
        return self._waits

    def settle(self, allocation: Allocation) -> None:
        """See `LayerCompressor.settle`."""
        observed, scores = self.waiting()
        self._waits = None
        self._group(observed, allocation, scores)

    def _group(self, observed: Observed, allocation: Allocation, scores: Tensor) -> None:
        """The heads' budgets are known: make regions of their sizes, and evict."""
        room, first = self._room, self.allocation is None
        allocation = observed.shard.own(allocation, self.kv_heads)
        uneven = allocation.local is not None or allocation.largest != self.plan.budget
        self.allocation = allocation
        move = not first or uneven or self.over_layers or room != self.plan.budget + self.plan.row
        self._evict_down(observed, allocation, scores, move=move)

    def _evict_down(self, observed: Observed, allocation: Allocation, scores: Tensor, *, move: bool) -> None:
        store = self.store
        victims = self._victims(observed, allocation, scores)
        bound = max(self.row_condition) + allocation.largest
        if move:
            self.store = store.regroup(*self._capacity(), max_length=bound, keep=~victims)
        else:
            store.evict(victims)
            store.max_length = bound
        self._forget()

    @property
    def _room(self) -> int:
        """Image entries that each region has room for before the first eviction."""
        first = self.pieces.schedule.first(self.plan)
        if self.pieces.allocator.queries_needed(self.plan):
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
