# SPDX-License-Identifier: Apache-2.0
"""LayerCompressor: the entries that one layer keeps. What images and texts have in common; see the two subclasses."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from . import kernels
from .model_pool import ModelPool
from .observer import Observer, queries_counted
from .pieces import Allocation, ModelAllocator, Observed
from .plan import Plan
from .ragged import RaggedKV
from .registry import Pieces


class LayerCompressor:
    """Takes over after the prompt's attention: holds the entries, attends over them, and evicts on schedule.

    Args:
        pieces: the method's.
        plan: budget and layout.
        kv_heads: G.
        pool: where the layers of the cache meet if the allocator compares them.
    """

    store: RaggedKV
    condition: Tensor
    """[B] int32, how many first entries of each row always stay."""
    row_condition: list[int]
    """`condition` on the host."""
    seen: Tensor
    """[B] int32, real tokens of each row so far."""
    row_seen: list[int]
    """`seen` on the host."""

    def __init__(self, pieces: Pieces, plan: Plan, kv_heads: int, pool: ModelPool | None = None) -> None:
        self.pieces, self.plan, self.kv_heads = pieces, plan, kv_heads
        self.pool = pool or ModelPool()
        self.decoded = 0
        """Decoded tokens by which the schedule counts."""
        self.allocation: Allocation | None = None
        self.observer = Observer()
        self.nbytes_peak = 0

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
        """One token per row: store it, attend, and evict if it is time.

        Args:
            query: [B, H, 1, D]; keys, values: [B, G, 1, D].
            scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

        Returns:
            [B, 1, H, D].
        """
        store = self.store
        store.max_length += 1
        store.ordered = False  # the newest is last, but an eviction may have filled holes before
        output = kernels.append_decode(
            query[:, :, 0],
            keys[:, :, 0],
            values[:, :, 0],
            self.seen,
            store.keys,
            store.values,
            store.positions,
            store.start,
            store.length,
            scale=scale,
            max_length=store.max_length,
            softcap=softcap,
            sinks=sinks,
            mass=store.mass if self._queries_counted(1) else None,
            mass_of=self.pieces.scorer.adds_up,
        )
        self._count(1)
        self.after_decode(query, scale)
        return output[:, None]

    def after_decode(self, query: Tensor, scale: float) -> None:
        """Observe the query [B, H, 1, D] and evict if it is time."""
        raise NotImplementedError

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
        """Several tokens at once: attend over store and chunk, then evict.

        Args:
            query: [B, H, T, D]; keys, values: [B, G, T, D].
            visible: [B, T] bool, False for padding.
            scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

        Returns:
            [B, T, H, D].
        """
        raise NotImplementedError

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens.

        Raises:
            ValueError: once entries were evicted, or for more tokens than can be taken back.
        """
        raise NotImplementedError

    @property
    def over_layers(self) -> bool:
        """Does the allocator compare all layers?"""
        return isinstance(self.pieces.allocator, ModelAllocator) and self.pieces.allocator.over_layers

    @property
    def model_allocator(self) -> ModelAllocator:
        """The allocator.

        Raises:
            TypeError: if it does not compare layers.
        """
        if not isinstance(self.pieces.allocator, ModelAllocator):
            raise TypeError(f"{type(self.pieces.allocator).__name__} divides the budget of one layer only")
        return self.pieces.allocator

    def waiting(self) -> tuple[Observed, Tensor]:
        """While the layer waits for the others: what it holds, and the scores of its entries [N].

        Raises:
            RuntimeError: if it does not wait.
        """
        raise NotImplementedError

    def narrow(self, allocation: Allocation, *, worth: float) -> None:
        """While the layer waits: evict down to this if it holds at least `worth` times as much.

        Raises:
            NotImplementedError: if it does not evict before it settles.
        """
        raise NotImplementedError

    def settle(self, allocation: Allocation) -> None:
        """All layers have come: evict down to what was allocated to this one."""
        raise NotImplementedError

    @property
    def next_due(self) -> int:
        """Number of decoded tokens at which the next decision falls."""
        step = self.plan.step
        return max(self.pieces.schedule.first(self.plan), (self.decoded // step + 1) * step)

    def _queries_counted(self, tokens: int) -> int:
        """How many of the newest of `tokens` queries, before they are counted as decoded, add to `RaggedKV.mass`?"""
        until_due = self.next_due - self.decoded - tokens
        return queries_counted(tokens, until_due=until_due, window=self.pieces.scorer.attention_window(self.plan))

    @property
    def wants_mass(self) -> bool:
        """Must the storage have room for what is added up?"""
        return self.pieces.scorer.attention_window(self.plan) > 0

    def _queries_needed(self, *, undecided: bool) -> int:
        """How many of the last decoded queries the next decision looks at."""
        pieces, plan = self.pieces, self.plan
        return max(
            pieces.allocator.queries_needed(plan) if undecided else 0,
            pieces.scorer.queries_needed(plan, decoding=True),
            pieces.selector.queries_needed(plan, decoding=True),
        )

    def _victims(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Tensor:
        """Who leaves, [N] bool; what the selector remembers goes along with the others."""
        selection = self.pieces.selector.select(observed, allocation, scores)
        self.store.credit = selection.credit
        return selection.victims

    def _count(self, tokens: int) -> None:
        """One token per row more, for every token of the step."""
        self.seen += tokens
        self.row_seen = [count + tokens for count in self.row_seen]

    def _forget(self) -> None:
        """After a decision: what was observed for it has served."""
        if self.store.mass is not None and not self.pieces.scorer.accumulates:
            self.store.mass.zero_()
        self.observer.clear()
        self._track_peak()

    def select_rows(self, rows: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held; `rows` is [B'] int64."""
        host = rows.tolist()
        self.store = self.store.select_rows(rows)
        self.row_condition = [self.row_condition[row] for row in host]
        self.row_seen = [self.row_seen[row] for row in host]
        self.condition, self.seen = self.condition[rows], self.seen[rows]
        self.observer.select_rows(rows)
        if self.allocation is not None:
            self.allocation = select_allocation(self.allocation, rows)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        allocation = [] if self.allocation is None else list(tensor_fields(self.allocation).values())
        held = self.pieces.scorer.held(self.plan)
        return [*self.store.tensors, self.condition, self.seen, *self.observer.tensors, *allocation, *held]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def join(self, pool: ModelPool) -> None:
        """Meet the other layers of the cache in `pool`."""
        self.pool = pool
        pool.note(self.plan.place.index, self.nbytes)

    def _track_peak(self) -> None:
        nbytes = self.nbytes
        self.nbytes_peak = max(self.nbytes_peak, nbytes)
        self.pool.note(self.plan.place.index, nbytes)


def select_allocation(allocation: Allocation, rows: Tensor) -> Allocation:
    """The allocation of other rows; `rows` is [B'] int64."""
    taken: dict[str, Any] = {name: tensor[rows] for name, tensor in tensor_fields(allocation).items()}
    for name in ("row_totals", "row_before"):
        numbers = getattr(allocation, name)
        taken[name] = numbers and [numbers[row] for row in rows.tolist()]
    return replace(allocation, **taken)


def tensor_fields(allocation: Allocation) -> dict[str, Tensor]:
    """The tensors of an allocation by name."""
    values = {field.name: getattr(allocation, field.name) for field in fields(allocation)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
