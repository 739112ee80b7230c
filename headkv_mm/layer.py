# SPDX-License-Identifier: Apache-2.0
"""HeadKVLayer: one layer's cache, as transformers sees it and as the "headkv" attention uses it.

transformers calls `update` with the new keys and values, then the attention function. What `update` got waits until the
attention function claims it through the layer (`claim`), since only there the mask (which tokens are padding) and the
query (which entries matter) are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import kernels
from .budgets import Budget, ImagePlan, image_plan
from .chunk import attend_chunk, visible_columns
from .image_grid import ImageGrid
from .observer import Observer
from .pieces import Allocation, Observed
from .ragged import RaggedKV
from .registry import Method

LAYER_ATTRIBUTE = "_headkv_layer"
"""Attribute of the key tensor that `update` returns; it leads the attention function to the layer."""

_T = TypeVar("_T")
AttentionOutput = tuple[Tensor, Tensor | None]

_UNCLAIMED = (
    "this model's attention never asked the compressed cache for its entries: it does not run the 'headkv' attention. "
    "Use `with headkv_mm.compress(model, ...)`, or call model.set_attn_implementation('headkv') once before generating. "
    "Models that do not go through transformers' attention interface cannot be compressed"
)


class HeadKVLayer(CacheLayerMixin):  # type: ignore[misc]
    """The compressed cache of one full-attention layer.

    Args:
        method: the resolved method.
        budget: entries per head, see `headkv_mm.budgets`.
        grid: where the image lies.
        layers: compressed layers of the model, to divide a budget in bytes.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, method: Method, budget: Budget, grid: ImageGrid | None, layers: int) -> None:
        super().__init__()
        self.method, self.budget, self.grid, self.layers = method, budget, grid, layers
        self.plan: ImagePlan | None = None
        if grid is not None and method.compresses and not isinstance(budget, str):
            self._set_plan(image_plan(budget, grid))
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.store: RaggedKV | None = None
        self.allocation: Allocation | None = None
        self.seen = 0
        """Tokens seen, padding included: what transformers asks for."""
        self.decoded = 0
        """Image tokens among them; negative while tokens before the image are decoded."""
        self.in_prompt = True
        self.padding: Tensor | None = None
        """[B] int32 padding columns of each row, None without padding."""
        self.condition: Tensor | None = None
        self.row_condition: list[int] = []
        self.row_seen: Tensor | None = None
        self.observer = Observer()
        self.nbytes_peak = 0
        self._pending: tuple[Tensor, Tensor] | None = None

    def _set_plan(self, plan: ImagePlan) -> None:
        if self.method.schedule is not None and not plan.keeps_all:
            self.method.schedule.first(plan)  # refuses a first eviction beyond the image
        self.plan = plan

    @property
    def keeps_all(self) -> bool:
        """True if this layer is a stock cache: nothing ever leaves."""
        return not self.method.compresses or (self.plan is not None and self.plan.keeps_all)

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take [B, G, T, D] keys and values; return what the attention function is called with."""
        if self._pending is not None:
            raise RuntimeError(_UNCLAIMED)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        if self.keeps_all:
            self._append_dense(key_states, value_states)
            key_states, value_states = self.keys, self.values  # type: ignore[assignment]
        else:
            if self.store is not None and key_states.shape[0] != self.store.rows:
                raise ValueError(
                    f"the cache holds {self.store.rows} rows and got keys of {key_states.shape[0]}; "
                    "use one cache per batch, or batch_repeat_interleave to repeat its rows"
                )
            self._pending = (key_states, value_states)
        # A fresh view: an attribute on a stored tensor would keep the layer alive in a cycle.
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER_ATTRIBUTE, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions are counted from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.14

    def reset(self) -> None:
        self._clear()
        if isinstance(self.budget, str):
            self.plan = None  # bytes per head depend on the batch

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded; use offloading=False")

    prefetch = offload

    def activate_past_recording(self) -> None:
        raise ValueError(
            "assisted decoding takes tokens back, and a compressed cache cannot restore what it evicted; "
            "generate without an assistant, or without kv_compression"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self._rows()
        if rows:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held. `indices` is [B'] int64 or a [B] bool mask."""
        if not self._rows():
            return
        rows = torch.arange(self._rows(), device=indices.device)[indices].to(self.device)
        host = rows.tolist()
        if self.store is not None:
            self.store = self.store.select_rows(rows)
            self.row_condition = [self.row_condition[row] for row in host]
        if self.allocation is not None:
            self.allocation = replace(
                self.allocation,
                row_totals=[self.allocation.row_totals[row] for row in host],
                **{name: tensor[rows] for name, tensor in _tensor_fields(self.allocation).items()},
            )
        for name in ("keys", "values", "padding", "condition", "row_seen"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[rows])
        self.observer.select_rows(rows)

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive number is the length to keep (transformers < 5.15).

        Raises:
            ValueError: once entries were evicted.
        """
        remove = -tokens if tokens <= 0 else self.seen - tokens
        if remove <= 0:
            return
        if self.allocation is not None:
            raise ValueError("entries were evicted, so the cache cannot be cropped; crop before the first eviction")
        if self.store is not None:
            self._crop_store(self.store, remove)
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.seen -= remove

    def _crop_store(self, store: RaggedKV, remove: int) -> None:
        if self.in_prompt:
            raise ValueError("the prompt cannot be cropped; reset the cache and prefill again")
        if self.decoded - remove < -held(self.grid).start:
            raise ValueError(
                f"only {self.decoded + held(self.grid).start} tokens follow the prompt; cannot crop {remove}"
            )
        self.row_seen = held(self.row_seen) - remove
        row_slots = torch.tensor(store.row_slots, device=self.device)
        store.evict(store.positions >= torch.repeat_interleave(self.row_seen, row_slots))
        self.decoded -= remove
        # What was learnt from the removed queries cannot be taken out of a sum; the next ones start anew.
        self.observer = Observer()

    # What the attention function calls

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        stock: Callable[[], AttentionOutput],
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention of the new tokens over what is kept, then whatever the schedule asks for.

        Args:
            query: [B, H, T, D].
            mask: transformers' mask for the full sequence, or None.
            scale: multiplies q.k.
            stock: runs the stock attention over what `update` returned.
            softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

        Returns:
            [B, T, H, D] and no attention weights (the stock attention's own output where that ran).
        """
        tokens = query.shape[2]
        if self.keeps_all:
            if tokens > 1 or self.seen == tokens:
                self._note_padding(visible_columns(mask, tokens))
            return stock()
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError("a compressed cache is for inference; run the model under torch.no_grad()")
        keys, values = self._claim()
        if self.store is None:
            output = stock()
            self._start(keys, values, visible_columns(mask, tokens))
            return output
        if tokens == 1:
            return self._decode(query, keys, values, scale, softcap, sinks), None
        return self._append(query, keys, values, mask, scale, softcap, sinks), None

    def _claim(self) -> tuple[Tensor, Tensor]:
        if self._pending is None:
            raise RuntimeError("the compressed cache was asked for entries twice in one step; it got no new ones")
        pending, self._pending = self._pending, None
        return pending

    def _start(self, keys: Tensor, values: Tensor, visible: Tensor | None) -> None:
        """Move the prompt, pads left out, into regions that have room until the first eviction."""
        batch, heads, tokens, head_dim = keys.shape
        grid = self.grid
        if grid is None:
            raise RuntimeError("a compressed layer has no image grid")
        if visible is None:
            visible = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device)
            self.row_condition = [tokens + grid.start] * batch
        else:
            self.row_condition = [count + grid.start for count in visible.sum(-1).tolist()]
        self._note_padding(visible)
        self.decoded = -grid.start
        if self.plan is None:
            self._set_plan(
                image_plan(
                    self.budget,
                    grid,
                    bytes_per_entry=2 * self.layers * batch * heads * head_dim * keys.element_size(),
                    condition=max(self.row_condition),
                )
            )
            if self.keeps_all:
                self._append_dense(keys, values)
                return
        self.row_seen = torch.zeros(batch, dtype=torch.int32, device=keys.device)
        self.condition = visible.sum(-1, dtype=torch.int32) + grid.start
        self.store = RaggedKV.empty(
            *self._capacity(heads),
            head_dim,
            dtype=keys.dtype,
            with_mass=self.method.scorer is not None and self.method.scorer.needs_attention,
        )
        self._write_chunk(keys, values, visible)
        self._track_peak()

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        store = held(self.store)
        row_seen = held(self.row_seen)
        self.in_prompt = False
        store.max_length += 1
        output = kernels.append_decode(
            query[:, :, 0],
            keys[:, :, 0],
            values[:, :, 0],
            row_seen,
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
        row_seen += 1
        self._observe(query, scale)
        return output[:, None]

    def _append(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Several tokens at once (chunked prefill, a second turn): attend over store and chunk, then evict."""
        tokens, heads = query.shape[2], keys.shape[1]
        store = held(self.store)
        visible = visible_columns(mask, tokens)
        if visible is None:
            visible = torch.ones(keys.shape[0], tokens, dtype=torch.bool, device=keys.device)
        if self.in_prompt:
            counts = visible.sum(-1, dtype=torch.int32)
            self.condition = held(self.condition) + counts
            self.row_condition = [
                before + count for before, count in zip(self.row_condition, counts.tolist(), strict=True)
            ]
        self._note_padding(visible)
        self.store = store.regroup(
            store.capacity + tokens,
            [slots + tokens * heads for slots in store.row_slots],
            max_length=store.max_length,
        )
        first_query = held(self.row_seen).clone()
        self._write_chunk(keys, values, visible)
        # Padding sees nothing, and nothing sees it: position -1 comes before every entry.
        query_positions = torch.where(visible, first_query[:, None] + visible.cumsum(-1) - 1, -1).to(
            torch.int32
        )  # [B, T]
        output = attend_chunk(query, query_positions, self.store, scale=scale, softcap=softcap, sinks=sinks)
        if not self.in_prompt:
            self._observe(query, scale, visible, query_positions)
        store = held(self.store)
        self.store = store.regroup(*self._capacity(heads), max_length=store.max_length)
        return output

    def _write_chunk(self, keys: Tensor, values: Tensor, visible: Tensor) -> None:
        row_seen = held(self.row_seen)
        held(self.store).append_chunk(keys, values, visible, row_seen)
        row_seen += visible.sum(-1, dtype=torch.int32)

    def _observe(
        self,
        query: Tensor,
        scale: float,
        visible: Tensor | None = None,
        query_positions: Tensor | None = None,
    ) -> None:
        """Keep what the next decision needs of these queries, and decide if it is due."""
        plan, schedule = held(self.plan), held(self.method.schedule)
        before, self.decoded = self.decoded, self.decoded + query.shape[2]
        until_first = schedule.first(plan) - self.decoded
        if self.observer.watch(
            query, self.method, plan, until_first=until_first, grouped=self.allocation is not None, visible=visible
        ):
            self._track_peak()
        store = held(self.store)
        if store.mass is not None and query_positions is not None:
            # Decoding adds up attention as it goes; a chunk adds its own here.
            queries = query.transpose(1, 2)
            group = query.shape[1] // store.kv_heads
            store.mass += (query.shape[2] * group) * kernels.window_mass(
                queries, query_positions, store.keys, store.positions, store.start, store.length, scale=scale
            ).to(store.mass.dtype)
        if schedule.due(before, self.decoded, plan):
            self._evict(scale)

    def _evict(self, scale: float) -> None:
        plan, store = held(self.plan), held(self.store)
        scorer, selector = held(self.method.scorer), held(self.method.selector)
        observed = Observed(
            store=store,
            plan=plan,
            condition=held(self.condition),
            seen=held(self.row_seen),
            scale=scale,
            mean_query=self.observer.mean_query,
            queries=self.observer.queries,
            attention=store.mass,
        )
        grouping = self.allocation is None
        room = self._room
        if self.allocation is None:
            self.allocation = held(self.method.allocator).allocate(observed)
        victims = selector.victims(observed, self.allocation, scorer.score_entries(observed))
        bound = max(self.row_condition) + self.allocation.largest
        if grouping and (self.allocation.local is not None or room != plan.budget + plan.row):
            self.store = store.regroup(*self._capacity(store.kv_heads), max_length=bound, keep=~victims)
        else:
            store.evict(victims)
            store.max_length = bound
        if self.store is not None and self.store.mass is not None:
            self.store.mass.zero_()
        self.observer.clear(grouped=True)
        self._track_peak()

    # Bookkeeping

    @property
    def _room(self) -> int:
        """Image entries that each region has room for before the first eviction."""
        plan, schedule = held(self.plan), held(self.method.schedule)
        first = schedule.first(plan)
        allocator = held(self.method.allocator)
        if allocator.queries_needed(plan):
            return first  # the grouping will move everything anyway
        return max(first, plan.budget + plan.row)

    def _capacity(self, heads: int) -> tuple[Tensor, list[int]]:
        """Slots of every region [B, G] int32, and their sums per row: condition, what is kept, and one row."""
        condition = held(self.condition)[:, None]
        plan = held(self.plan)
        if self.allocation is None:
            capacity = (condition + self._room).expand(-1, heads).contiguous()
            return capacity, [heads * (count + self._room) for count in self.row_condition]
        capacity = condition + self.allocation.targets + plan.row
        return capacity, [
            heads * (count + plan.row) + total
            for count, total in zip(self.row_condition, self.allocation.row_totals, strict=True)
        ]

    def _append_dense(self, keys: Tensor, values: Tensor) -> None:
        # Exactly what a stock layer does, also at the first call, so that results are the same bit for bit.
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.new_empty(0), values.new_empty(0)
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)
        self._track_peak()

    def _note_padding(self, visible: Tensor | None) -> None:
        if visible is not None:
            padding = (~visible).sum(-1, dtype=torch.int32)
            self.padding = padding if self.padding is None else self.padding + padding

    def _rows(self) -> int:
        if self.store is not None:
            return self.store.rows
        return 0 if self.keys is None else self.keys.shape[0]

    def _track_peak(self) -> None:
        self.nbytes_peak = max(self.nbytes_peak, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        tensors = [self.keys, self.values, self.padding, self.condition, self.row_seen, *self.observer.tensors]
        if self.store is not None:
            tensors += self.store.tensors
        if self.allocation is not None:
            tensors += _tensor_fields(self.allocation).values()
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock cache would hold after the same tokens, padding included."""
        if self.store is not None:
            store = self.store
            return 2 * store.rows * store.kv_heads * self.seen * store.keys.shape[-1] * store.keys.element_size()
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def kept_positions(self) -> list[list[Tensor]]:
        """Positions kept, a list over rows of lists over KV heads; padding takes no position."""
        if self.store is not None:
            return self.store.kept_positions()
        if self.keys is None:
            return []
        rows, heads = self.keys.shape[:2]
        padding = [0] * rows if self.padding is None else self.padding.tolist()
        return [[torch.arange(self.seen - padding[row]) for _ in range(heads)] for row in range(rows)]


def held(value: _T | None) -> _T:
    """The value, which the order of calls guarantees to be there."""
    if value is None:
        raise RuntimeError("the compressed cache was used before its first tokens came through `update`")
    return value


def _tensor_fields(allocation: Allocation) -> dict[str, Tensor]:
    values = {field.name: getattr(allocation, field.name) for field in fields(allocation)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
