# SPDX-License-Identifier: Apache-2.0
"""The four pieces of a method: scorer, allocator, selector and schedule.

A method is a composition of four small frozen dataclasses. Their fields are the method's options. They are pure: they
look at what a layer observed and return tensors; the cache does the moving. The same pieces serve images and texts;
what differs between the two is in the plan. Nothing here may read the device from the host while tokens are decoded,
except an allocator, which runs once per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .kernels.mass_kinds import MassOf
from .plan import Plan
from .ragged import RaggedKV
from .tensor_parallel import HeadShard


@dataclass(frozen=True)
class Observed:
    """What a layer knows when it has to decide.

    Attributes:
        store: keys, values, positions, lengths. At the end of a prompt these are views of the whole prompt.
        plan: when and how much.
        condition: [B] int32, entries that always stay: positions below this number (an image's condition, or sinks).
        seen: [B] int32, real tokens of each row so far, so the newest position is `seen - 1`.
        scale: multiplies q.k.
        row_budgets: entries per KV head, after the condition, that each row keeps on the average; on the host.
        row_seen: `seen` on the host.
        mean_query: [B, H, D] float32, mean of the last queries before the eviction, if the scorer needs it.
        queries: [B, Q, H, D], the last queries in order, as many as scorer and allocator ask for, or fewer if there are
            no more.
        query_positions: [B, Q] int32, their positions; -1 for padding.
        credit: [N] float32, what the selector remembered of the entries at the last decision, 0 for newer ones, or
            None.
        added_up: [N] float32, what each slot got from the last decoded queries (or from all, for scorers that
            accumulate), summed over queries and group: attention, or what else `Scorer.adds_up` names. None at the end
            of a prompt.
        query_counts: how many queries of each row `mean_query` is of, on the host, while decoding; else empty.
        softcap: of the attention's logits, 0 for none.
        sinks: [H], learned logits in the softmax's denominator, or None.
        noted: what a `ModelAllocator` noted of the layer, when it divides; else None.
    """

    store: RaggedKV
    plan: Plan
    condition: Tensor
    seen: Tensor
    scale: float
    row_budgets: Sequence[int] = ()
    row_seen: Sequence[int] = ()
    mean_query: Tensor | None = None
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    credit: Tensor | None = None
    added_up: Tensor | None = None
    query_counts: Sequence[int] = ()
    softcap: float = 0.0
    sinks: Tensor | None = None
    noted: Tensor | None = None

    @property
    def shard(self) -> HeadShard:
        """The heads that this process has; without tensor parallelism all."""
        return self.plan.place.shard

    @property
    def heads(self) -> int:
        """KV heads of the layer, those of other processes included."""
        return self.store.kv_heads * self.shard.size

    def per_row(self, numbers: Sequence[int]) -> Tensor:
        """Host numbers, one per row, as [B, 1] int32 on the layer's device."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.seen.device)[:, None]

    def last_queries(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` queries [B, Q, H, D] and their positions [B, Q], or all if there are fewer.

        Raises:
            RuntimeError: if the layer kept none: the piece must ask for them in `queries_needed`.
        """
        if self.queries is None or self.query_positions is None:
            raise RuntimeError("this piece needs the last queries, and the layer kept none")
        return self.queries[:, -count:], self.query_positions[:, -count:]


@dataclass(frozen=True)
class Allocation:
    """What each region keeps after every eviction, condition not counted.

    Attributes:
        targets: [B, G] int32, entries kept. An allocator gives those of all `Observed.heads` of the layer, of which
            tensor parallelism leaves each process its own.
        windows: [B, G] int32, how many of them are the newest.
        row_totals: the sum of each row of `targets`, on the host.
        largest: an upper bound of `targets`, on the host.
        local: [B, G] bool, True where a head was found to be local; None if the method has no head types.
        row_before: entries of each row that the layers before this one keep, on the host; None where every layer keeps
            exactly its budget.
        alike: all heads of the layer keep the same entries, and shall go on doing so.
    """

    targets: Tensor
    windows: Tensor
    row_totals: list[int]
    largest: int
    local: Tensor | None = None
    row_before: list[int] | None = None
    alike: bool = False


class Scorer:
    """Ranks entries: higher stays. What it needs beyond the storage it says in the other methods."""

    @property
    def needs_mean_query(self) -> bool:
        """The mean of the last queries."""
        return False

    @property
    def adds_up(self) -> MassOf:
        """What the slots get from every query that `attention_window` counts: "attention", or "squared_logits"."""
        return "attention"

    @property
    def accumulates(self) -> bool:
        """Attention is added up over everything and never forgotten, the prompt's queries included."""
        return False

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """How many of the last queries it looks at: of the prompt's (they cost nothing), or while decoding."""
        return 0

    def attention_window(self, plan: Plan) -> int:
        """How many of the last decoded queries must have left their attention on the slots; 0 if it looks at none."""
        return 0

    def mean_window(self, plan: Plan) -> int:
        """How many of the last queries before a decision the mean query is of; a prompt's is of those needed."""
        return plan.step

    def held(self, plan: Plan) -> list[Tensor]:
        """Tensors that it holds on behalf of a layer; they count as the cache's."""
        return []

    def held_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of these, for H query heads of size D."""
        return 0

    def score_entries(self, observed: Observed) -> Tensor:
        """Scores [N] float32."""
        raise NotImplementedError


class Allocator(Protocol):
    """Gives every region its number of entries, once per row.

    A piece that must know the model has a method `for_model(model_or_config)` that returns the piece to use with it.
    """

    def queries_needed(self, plan: Plan) -> int:
        """How many of the last queries must be there when it decides; 0 if it looks at none."""
        ...

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Divide `observed.row_budgets` among the heads. `scores` [N] are the scorer's."""
        ...


@runtime_checkable
class ModelAllocator(Allocator, Protocol):
    """An allocator that may compare all layers of a cache before it decides."""

    @property
    def over_layers(self) -> bool:
        """True if it does; its `allocate` is then not asked."""
        ...

    def note(self, observed: Observed, scores: Tensor) -> Tensor | None:
        """What `divide` and `at_most` must know of a layer beside its entries' scores: of all heads, or None.

        It is [B, G], or [B, G, M] by rank among a head's entries, of which ranks that it does not keep may be dropped.
        """
        ...

    def preselect(self, observed: Observed, scores: Tensor) -> Allocation:
        """What a text's layer keeps until the others have come, where what is kept cannot be narrowed in steps."""
        ...

    def at_most(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The most that `divide` may give the layers that have come so far, whatever those to come bring.

        Args:
            layers: the first ones of the model, as for `divide`; the last of them holds everything still.

        Returns:
            Targets [B, G] and windows [B, 1] of every layer, of all heads, on its device; nothing is read from there.
        """
        ...

    def divide(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[Allocation]:
        """Divide one budget, in the model's order, given what every layer holds, its scores [N] and what was noted.

        A text's layers hold what `at_most` or `preselect` left them, and an image's everything.
        """
        ...


@dataclass(frozen=True)
class Selection:
    """What a selector decided.

    Attributes:
        victims: [N] bool, True for what leaves: exactly as many as are above each region's target, never what is
            protected.
        credit: [N] float32 that goes along with the entries and comes back in `Observed.credit`; None for none.
    """

    victims: Tensor
    credit: Tensor | None = None


class Selector:
    """Chooses who leaves. A subclass has `victims`, or `select` if it remembers something of the entries."""

    @property
    def remembers(self) -> bool:
        """A number of every entry is kept from one decision to the next."""
        return False

    @property
    def nested(self) -> bool:
        """What it keeps is among what it keeps of a larger budget, so evicting in steps leaves the same entries."""
        return False

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        """How many of the last queries it looks at: of the prompt's (they cost nothing), or while decoding."""
        return 0

    def victims(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Tensor:
        """[N] bool, see `Selection`."""
        raise NotImplementedError

    def select(self, observed: Observed, allocation: Allocation, scores: Tensor) -> Selection:
        """The victims, and what to remember."""
        return Selection(self.victims(observed, allocation, scores))


class Schedule(Protocol):
    """Says on the host, by counting tokens, when to evict."""

    def first(self, plan: Plan) -> int:
        """Image tokens after which the first eviction may happen; 0 in a text: as soon as the budget is full."""
        ...

    def due(self, before: int, after: int, plan: Plan) -> bool:
        """Is an eviction due when the number of decoded tokens went from `before` to `after`?"""
        ...
