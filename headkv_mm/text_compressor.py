# SPDX-License-Identifier: Apache-2.0
"""TextCompressor: the entries that one layer keeps of a text, from its prompt on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import kernels
from .asked import Asked
from .chunk import attend_chunk
from .compressor import LayerCompressor
from .decided import Decided
from .model_pool import ModelPool
from .passed import Passed
from .pieces import Allocation, Observed
from .propagation import Propagation
from .ragged import RaggedKV
from .registry import Pieces
from .regroup_in_turn import regroup_in_turn
from .row_allocations import joined
from .text_plan import TextPlan


class TextCompressor(LayerCompressor):
    """Selects at the end of the prompt, after every further chunk, and every interval of decoded tokens.

    Every row decides for itself when it is over its budget and how its heads share it, so a row of a batch keeps what
    it would keep alone. Head budgets are decided once, when a row first exceeds its budget; where the budget is a share
    of the text they grow in proportion.

    Args:
        pieces: the method's.
        plan: budget and interval.
        keys, values: [B, G, T, D] of the prompt, padding at the left.
        padding: [B] int32, padding columns of each row.
        row_prompt: real prompt tokens of each row, on the host.
        asked: the prompt's queries, the last of them at least.
        pool: where the layers of the cache meet if the allocator compares them.
        positions: [B, T] int32 of the prompt's tokens, -1 for padding, where not all of them came; None for all.
        propagation: what must know which tokens this layer finds important; None for most layers.
    """

    plan: TextPlan
    _prompt_bytes = 0
    """Bytes of the dense prompt while the layer chooses among it."""

    def __init__(
        self,
        pieces: Pieces,
        plan: TextPlan,
        keys: Tensor,
        values: Tensor,
        padding: Tensor,
        row_prompt: list[int],
        asked: Asked,
        pool: ModelPool | None = None,
        *,
        positions: Tensor | None = None,
        propagation: Propagation | None = None,
    ) -> None:
        super().__init__(pieces, plan, keys.shape[1], pool)
        self.propagation = propagation
        self.fresh: list[int] = []  # rows that wait for the other layers
        self.noted: Tensor | None = None  # what the allocator noted of them
        self.evicts = True
        """False in copies that only grow."""
        self.row_seen = list(row_prompt)
        self.seen = torch.tensor(row_prompt, dtype=torch.int32, device=keys.device)
        self.decided: list[Decided | None] = [None] * len(row_prompt)
        """Per row the allocation as it was decided; None while the row is within its budget."""
        self.appended = 0  # tokens that a copy that only grows got since the last eviction
        self.made_for: list[int] = []  # entries of each row for which the regions were made
        self.tight = True
        """The regions have no room for a decoded token: a document that is only read takes none."""
        self._set_budgets([plan.entries(seen) for seen in self.row_seen])
        self.store = RaggedKV.over(keys, values, padding, positions=positions)
        self._prompt_bytes = keys.nbytes + values.nbytes
        self._decide(asked)
        self._prompt_bytes = 0
        if not self.fresh:
            self._track_peak()

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
        passed: Passed | None = None,
    ) -> Tensor:
        """Several tokens at once: attend over what is kept and the chunk, then evict down to the budget.

        Args:
            query: [B, H, T, D]; keys, values: [B, G, T, D].
            visible: [B, T] bool, False for padding.
            scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.
            passed: where the tokens belong if others of the forward went no further; None if all came.

        Returns:
            [B, T, H, D].
        """
        tokens, first = query.shape[2], self.seen.clone()
        self.store = self.store.regroup(
            self.store.capacity + tokens,
            [slots + tokens * self.kv_heads for slots in self.store.row_slots],
            max_length=self.store.max_length,
        )
        if passed is None:
            self.store.append_chunk(keys, values, visible, first)
            # Padding sees nothing, and nothing sees it: position -1 comes before every entry.
            positions = torch.where(visible, first[:, None] + visible.cumsum(-1) - 1, -1).to(torch.int32)  # [B, T]
            counts = visible.sum(-1, dtype=torch.int32)
            self.seen = self.seen + counts
            self.row_seen = [old + new for old, new in zip(self.row_seen, counts.tolist(), strict=True)]
        else:
            positions = passed.positions
            self.store.append_chunk(keys, values, visible, first, positions=positions)
            self.row_seen = list(passed.row_seen)
            self.seen = torch.tensor(self.row_seen, dtype=torch.int32, device=self.seen.device)
        if self.evicts:
            self._set_budgets([self.plan.entries(seen) for seen in self.row_seen])
        output = attend_chunk(query, positions, self.store, scale=scale, softcap=softcap, sinks=sinks)
        self.appended += 0 if self.evicts else tokens
        asked = Asked(query.transpose(1, 2), positions, scale, softcap, sinks)
        if self.pieces.scorer.accumulates and self.store.mass is not None:
            self.store.mass += self._attention_sum(asked)
        self._decide(asked)
        self.decoded = 0  # the next interval begins
        return output

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
        """See `LayerCompressor.decode`; the first token after a prompt or chunk makes room for an interval."""
        if self.tight:
            self._make_room(None, room=self.plan.step)
        return super().decode(query, keys, values, scale=scale, softcap=softcap, sinks=sinks)

    def after_decode(self, query: Tensor, scale: float) -> None:
        """Observe the query and evict if an interval has ended."""
        plan, pieces = self.plan, self.pieces
        before, until_due = self.decoded, self.next_due - self.decoded - 1
        self.decoded += 1
        self.appended += 0 if self.evicts else 1
        # Rows that will be over their budget at the next decision; there is nothing to observe for the others.
        over = [seen + until_due > entries for seen, entries in zip(self.row_seen, self.row_entries, strict=True)]
        if self.evicts and any(over):
            undecided = any(late and row is None for late, row in zip(over, self.decided, strict=True))
            allocated = self.observer.watch(
                query,
                window=pieces.scorer.mean_window(plan),
                until_due=until_due,
                mean=pieces.scorer.needs_mean_query,
                last=self._queries_needed(undecided=undecided),
            )
            if allocated:
                self._track_peak()
        if pieces.schedule.due(before, self.decoded, plan):
            if self.evicts:
                self._set_budgets([plan.grown(*row) for row in zip(self.row_entries, self.row_seen, strict=True)])
            queries = self.observer.queries
            if queries is None:
                queries = query.new_empty(query.shape[0], 0, query.shape[1], query.shape[3])
            # The newest query has age 1.
            ages = torch.arange(queries.shape[1], 0, -1, device=self.seen.device)
            positions = (self.seen[:, None] - ages).clamp(min=-1).to(torch.int32)
            self._decide(Asked(queries, positions, scale), decoding=True)

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens.

        Raises:
            ValueError: once entries were evicted, or for more tokens than there are.
        """
        if any(allocation is not None for allocation in self.decided):
            raise ValueError("entries were evicted, so the cache cannot be cropped; crop before the first eviction")
        if tokens >= min(self.row_seen):
            raise ValueError(
                f"a row has {min(self.row_seen)} tokens, so {tokens} cannot be cropped; reset the cache instead"
            )
        self._count(-tokens)
        self.store.evict(self.store.positions >= self.seen[self.store.row_of_slots()])
        self._set_budgets([self.plan.entries(seen) for seen in self.row_seen])
        self.decoded = max(self.decoded - tokens, 0)
        self._forget()

    def select_rows(self, rows: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held; `rows` is [B'] int64."""
        super().select_rows(rows)
        for name in ("decided", "made_for", "row_entries"):
            values = getattr(self, name)
            setattr(self, name, values and [values[row] for row in rows.tolist()])

    def copy(self, *, evicts: bool) -> TextCompressor:
        """The same content with a storage of its own.

        Args:
            evicts: False: nothing leaves the copy any more; it grows by what is appended.
        """
        twin = object.__new__(TextCompressor)
        twin.__dict__.update(self.__dict__)
        twin.store = self.store.copy()
        twin.seen, twin.condition = self.seen.clone(), self.condition.clone()
        twin.row_seen, twin.row_condition = list(self.row_seen), list(self.row_condition)
        twin.decided, twin.made_for, twin.row_entries = (
            list(self.decided),
            list(self.made_for),
            list(self.row_entries),
        )
        twin.observer = self.observer.copy()
        twin.evicts = evicts and self.evicts
        if self.evicts and not evicts:
            twin.appended = self.decoded % self.plan.step  # they would have made room at the next eviction
        twin.nbytes_peak = 0
        twin._track_peak()
        return twin

    def take_up(self) -> None:
        """Make what follows from the other attributes, after they were set from outside."""
        self._set_budgets(self.row_entries)
        if any(row is not None for row in self.decided):
            self.allocation = self._joined(
                [entries - first for entries, first in zip(self.row_entries, self.row_condition, strict=True)]
            )
        self._track_peak()

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is held, the allocations as they were decided included."""
        decided = [tensor for row in self.decided if row is not None for tensor in row.tensors.values()]
        return [*super().tensors, *decided, *([] if self.noted is None else [self.noted])]

    def _set_budgets(self, entries: list[int]) -> None:
        """Set how many entries a head of each row keeps on the average, and how many of them are sinks."""
        self.row_entries = entries
        self.row_condition = [self.plan.held_sinks(count) for count in entries]
        self.condition = torch.tensor(self.row_condition, dtype=torch.int32, device=self.seen.device)

    def _attention_sum(self, asked: Asked) -> Tensor:
        """Attention that queries give to the slots, summed over them and their group, [N] float32."""
        store, (_, count, heads, _) = self.store, asked.queries.shape
        mean = kernels.window_scores(
            asked.queries,
            asked.positions,
            store.keys,
            store.positions,
            store.start,
            store.length,
            scale=asked.scale,
            softcap=asked.softcap,
            sinks=asked.sinks,
        )
        return mean * (count * (heads // self.kv_heads))

    def _decide(self, asked: Asked, *, decoding: bool = False) -> None:
        """Evict down to the budget where a row is over it; while decoding make room for the next interval."""
        budgets = [entries - first for entries, first in zip(self.row_entries, self.row_condition, strict=True)]
        over = [self.evicts and seen > entries for seen, entries in zip(self.row_seen, self.row_entries, strict=True)]
        if self.propagation is not None and self.evicts and not decoding:
            self.propagation.look(self.pieces.scorer, self._observed(asked, budgets, decoding=False))
        victims = self._choose(asked, budgets, over, decoding=decoding) if any(over) else None
        self._make_room(victims, room=self.plan.step if decoding else 0)
        if self.fresh:
            self.pool.wait(self, prompt=self._prompt_bytes)
            return
        if self.wants_mass and self.store.mass is None:
            self.store.mass = torch.zeros(self.store.keys.shape[0], device=self.seen.device)
            if self.pieces.scorer.accumulates:
                self.store.mass += self._attention_sum(asked)
        self._forget()

    def _choose(self, asked: Asked, budgets: list[int], over: Sequence[bool], *, decoding: bool) -> Tensor:
        """Decide head budgets where that is due, and who leaves: [N] bool."""
        scorer, plan, store = self.pieces.scorer, self.plan, self.store
        observed = self._observed(asked, budgets, decoding=decoding)
        scores = scorer.score_entries(observed)
        if scorer.accumulates and store.mass is None:
            store.mass = scores  # it goes along with the entries
        fresh = [row for row, late in enumerate(over) if late and self.decided[row] is None]
        if fresh:
            if self.over_layers:
                self.noted = self.model_allocator.note(observed, scores)
                allocation = self._preselect(replace(observed, noted=self.noted), scores)
                self._cut_noted(allocation.largest)
                store.mass, self.fresh = scores, fresh  # scores go along with the entries
            else:
                allocation = self.pieces.allocator.allocate(observed, scores)
            for row in fresh:
                self.decided[row] = self._decided(allocation, row, budgets[row])
        if fresh or isinstance(plan.budget, float) or self.allocation is None:
            self.allocation = self._joined(budgets)
        return self._victims(observed, self.allocation, scores)

    def _observed(self, asked: Asked, budgets: list[int], *, decoding: bool) -> Observed:
        """What the pieces may look at when they decide."""
        scorer, plan, store = self.pieces.scorer, self.plan, self.store
        if not decoding:
            asked = asked.last(self.pieces.prompt_queries(plan))
        return Observed(
            store=store,
            plan=plan,
            condition=self.condition,
            seen=self.seen,
            scale=asked.scale,
            row_budgets=budgets,
            row_seen=self.row_seen,
            mean_query=self.observer.mean_query if decoding else asked.mean,
            query_counts=self.observer.counts if decoding else (),
            queries=asked.queries,
            query_positions=asked.positions,
            credit=store.credit,
            # Accumulated attention holds the prompt's; any other sum counts decoded queries only.
            added_up=store.mass if decoding or scorer.accumulates else None,
            softcap=asked.softcap,
            sinks=asked.sinks,
        )

    def waiting(self) -> tuple[Observed, Tensor]:
        """See `LayerCompressor.waiting`."""
        if not self.fresh or self.store.mass is None:
            raise RuntimeError("this layer has decided already")
        budgets = [entries - first for entries, first in zip(self.row_entries, self.row_condition, strict=True)]
        observed = Observed(
            store=self.store,
            plan=self.plan,
            condition=self.condition,
            seen=self.seen,
            scale=1.0,
            row_budgets=budgets,
            row_seen=self.row_seen,
            noted=self.noted,
        )
        return observed, self.store.mass

    def _preselect(self, observed: Observed, scores: Tensor) -> Allocation:
        """What must be held until the other layers have come."""
        if self.pieces.selector.nested:
            self.pool.note(self.plan.place.index, self.nbytes)
            return self.pool.narrow(self, observed, scores)
        return self.model_allocator.preselect(observed, scores)

    def narrow(self, allocation: Allocation, *, worth: float) -> None:
        """See `LayerCompressor.narrow`."""
        rows = [self.decided[row] for row in self.fresh]
        held = sum(row.allocation.row_totals[0] for row in rows if row is not None)
        if held >= worth * sum(allocation.row_totals[row] for row in self.fresh):
            self._evict_waiting(allocation)

    def settle(self, allocation: Allocation) -> None:
        """See `LayerCompressor.settle`."""
        self._evict_waiting(allocation)
        self.fresh, self.noted = [], None
        if not self.wants_mass:
            self.store.mass = None
        self._forget()

    def _evict_waiting(self, allocation: Allocation) -> None:
        """Evict the fresh rows down to what they can still get, or have got."""
        observed, scores = self.waiting()
        for row in self.fresh:
            self.decided[row] = self._decided(allocation, row, observed.row_budgets[row])
        self.allocation = self._joined(list(observed.row_budgets))
        self.made_for = []  # regions are made for what is allocated now
        victims = self._victims(observed, self.allocation, scores)
        self._make_room(victims, room=0 if self.tight else self.plan.step, in_turn=True)
        self._cut_noted(allocation.largest)

    def _cut_noted(self, entries: int) -> None:
        """Of a head that keeps so many entries no further ones count."""
        if self.noted is not None and self.noted.dim() > 2:
            self.noted = self.noted[..., :entries].clone()

    def _joined(self, budgets: list[int]) -> Allocation:
        """The rows' allocations as one."""
        shard, device = self.plan.place.shard, self.seen.device
        return joined(self.decided, budgets, shard=shard, kv_heads=self.kv_heads, device=device)

    def _decided(self, allocation: Allocation, row: int, budget: int) -> Decided:
        # On the host what this process's heads sum to is known without waiting for the device, see `row_allocations`.
        return Decided.of(allocation, row, budget, on_host=self.plan.place.shard.size > 1)

    def _make_room(self, victims: Tensor | None, *, room: int, in_turn: bool = False) -> None:
        """Remove the victims, and give every region room for `room` more tokens.

        Args:
            victims: [N] bool, None for nobody.
            room: tokens.
            in_turn: move keys before values, so that less is there at once: for what waits beside a dense prompt.
        """
        store, longest = self.store, max(self.row_seen)
        decided = self.allocation is not None and all(row is not None for row in self.decided)
        if decided and self.allocation is not None:
            longest = min(longest, max(self.row_condition) + self.allocation.largest + self.appended)
        same = decided and not self.appended and self.made_for == self.row_entries
        if same and not self.tight and room == self.plan.step:
            if victims is not None:
                store.evict(victims)
            store.max_length = longest
            return
        capacity, row_slots = self._capacity(room)
        keep = None if victims is None else ~victims
        passing = store.nbytes
        if in_turn:
            self.store, passing = regroup_in_turn(store, capacity, row_slots, max_length=longest, keep=keep)
        else:
            self.store = store.regroup(capacity, row_slots, max_length=longest, keep=keep)
        if self.fresh:
            self.pool.note(self.plan.place.index, self.nbytes, passing=passing)
        self.made_for, self.tight = list(self.row_entries) if decided else [], room == 0

    def _capacity(self, room: int) -> tuple[Tensor, list[int]]:
        """Slots of every region, [B, G] int32, and their sums per row: what is held at most, and room."""
        heads = self.kv_heads
        everything = self.seen[:, None].expand(-1, heads)  # [B, G]
        if self.allocation is None:
            return everything + room, [(seen + room) * heads for seen in self.row_seen]
        undecided = [decided is None for decided in self.decided]
        mask = torch.tensor(undecided, device=self.seen.device)[:, None]
        kept = self.condition[:, None] + self.allocation.targets + self.appended
        return torch.where(mask, everything, kept).to(torch.int32) + room, [
            heads * (room + seen) if whole else heads * (room + first + self.appended) + total
            for whole, seen, first, total in zip(
                undecided, self.row_seen, self.row_condition, self.allocation.row_totals, strict=True
            )
        ]
