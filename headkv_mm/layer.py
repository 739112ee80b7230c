# SPDX-License-Identifier: Apache-2.0
"""HeadKVLayer: one layer's cache, as transformers sees it and as the "headkv" attention uses it.

transformers calls `update` with the new keys and values, then the attention function. What `update` got waits until the
attention function claims it, since only there the mask (which tokens are padding) and the query (which entries matter)
are known.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .budgets import Budget, ImagePlan
from .chosen_mask import chosen_mask
from .chunk import visible_columns
from .compressor import LayerCompressor
from .image_compressor import ImageCompressor
from .image_grid import ImageGrid
from .layer_plan import layer_cost, layer_plan
from .model_pool import ModelPool
from .passed import Passed
from .pieces import Allocation
from .plan import LayerPlace, Plan
from .prompt import LeftPadded, Prompt, Reading
from .propagation import Propagation, Selection, observe_reading
from .ragged import RaggedKV
from .registry import Pieces
from .text_compressor import TextCompressor
from .text_plan import TextPlan

LAYER_ATTRIBUTE = "_headkv_layer"
"""Attribute of the key tensor that `update` returns; it leads the attention function to the layer."""

AttentionOutput = tuple[Tensor, Tensor | None]

_UNCLAIMED = (
    "this model's attention never asked the compressed cache for its entries: it does not run the 'headkv' attention. "
    "Use `with headkv_mm.compress(model, ...)`, or call model.set_attn_implementation('headkv') before generating. "
    "Models that do not go through transformers' attention interface cannot be compressed"
)


class HeadKVLayer(CacheLayerMixin):
    """The cache of one full-attention layer.

    While nothing ever has to leave (method "none", or a budget of everything) it is a stock layer, bit for bit.

    Args:
        pieces: of the method; None for the stock cache.
        budget: see `headkv_mm.budgets`.
        grid: where the image lies; None for a text.
        place: which of the model's compressed layers this is.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, pieces: Pieces | None, budget: Budget, grid: ImageGrid | None, place: LayerPlace) -> None:
        super().__init__()
        self.pieces, self.budget, self.grid, self.place = pieces, budget, grid, place
        self.pool = ModelPool()
        """Where it meets the other layers of its cache; see `share_pool`."""
        self.propagation: Propagation | None = None
        """What says which tokens go on after one of the layers; see `follow`."""
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.pool.clear()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.compressor: LayerCompressor | None = None
        self.seen = 0
        """Tokens seen, padding included: what transformers asks for."""
        self.padding: Tensor | None = None
        """[B] int32, padding columns of each row; None without padding."""
        self.plan: Plan | None = None
        """None until known: a budget in bytes is divided when the batch is seen."""
        if self.pieces is not None and not isinstance(self.budget, str):
            self.set_plan(layer_plan(self.pieces, self.budget, self.grid, self.place))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._reading: Reading | None = None
        self._dense_bytes = 0
        self._read_bytes = 0

    def set_plan(self, plan: Plan) -> None:
        """Take the plan, once it is known.

        Raises:
            ValueError: if the method does not suit it.
        """
        if self.pieces is not None and not plan.keeps_all:
            self.pieces.schedule.first(plan)  # refuses a first eviction beyond the image
        self.plan = plan

    @property
    def keeps_all(self) -> bool:
        """True if this layer is a stock layer: nothing ever leaves."""
        return self.pieces is None or (self.plan is not None and self.plan.keeps_all)

    @property
    def store(self) -> RaggedKV | None:
        """The ragged storage; None before the prompt, and for layers that keep all."""
        return None if self.compressor is None else self.compressor.store

    @property
    def allocation(self) -> Allocation | None:
        """Budgets and head types; None until they are decided."""
        return None if self.compressor is None else self.compressor.allocation

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take [B, G, T, D] keys and values; return what the attention function is called with.

        Raises:
            RuntimeError: if the attention function did not take what the last call brought.
            ValueError: if the batch changed.
        """
        if self._pending is not None:
            raise RuntimeError(_UNCLAIMED)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._rows() not in (0, key_states.shape[0]):
            raise ValueError(
                f"the cache holds {self._rows()} rows and got keys of {key_states.shape[0]}; use one cache per batch, "
                "or batch_repeat_interleave to repeat its rows"
            )
        selection = self._incoming
        self.seen += key_states.shape[-2] if selection is None else selection.tokens
        if self.keeps_all or self._reading is not None:
            key_states, value_states = self._append_dense(key_states, value_states)
        else:
            self._pending = (key_states, value_states)
        # A fresh view: an attribute on a stored tensor would keep the layer alive in a cycle.
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER_ATTRIBUTE, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions are counted from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask: that of a full cache."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.14

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def offload(self) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("a compressed cache is not offloaded; use offloading=False")

    prefetch = offload

    def activate_past_recording(self) -> None:
        """Refused: transformers calls this before assisted decoding.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "assisted decoding takes tokens back, and a compressed cache cannot restore what it evicted; "
            "generate without an assistant, or without kv_compression"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search; `beam_idx` is [B] int64."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held. `indices` is [B'] int64 or a [B] bool mask."""
        if self._rows() == 0:
            return
        rows = torch.arange(self._rows(), device=indices.device)[indices].to(self.device)
        if self.compressor is not None:
            self.compressor.select_rows(rows)
        for name in ("keys", "values", "padding"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[rows])

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive number is the length to keep (transformers < 5.15).

        Raises:
            ValueError: once entries were evicted, or for a cut into the prompt.
        """
        if self.propagation is not None and self._reading is not None:
            raise ValueError("a prompt that is being read by chosen tokens cannot be cropped; reset the cache instead")
        remove = -tokens if tokens <= 0 else self.seen - tokens
        if remove <= 0:
            return
        if self.compressor is not None:
            self.compressor.crop(remove)
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.seen -= remove

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

        Raises:
            RuntimeError: if gradients are asked for.
        """
        tokens = query.shape[2]
        prefill = tokens > 1 or self.seen == tokens
        selection = self._incoming
        if selection is None:
            visible = visible_columns(mask, tokens) if prefill else None
            self._note_padding(visible)
        else:
            visible = selection.passed.visible
            self._note_padding(selection.real)
        passed = None if selection is None else selection.passed
        if self.keeps_all:
            return stock()
        if self._reading is not None:
            needed = 1 if self.pieces is None or self.plan is None else self.pieces.prompt_queries(self.plan)
            self._reading.note(Prompt(query, scale, softcap, sinks), visible, needed, passed)
            self._choose_reading(tokens, visible)
            return stock()
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError("a compressed cache is for inference; run the model under torch.no_grad()")
        if self._pending is None:
            raise RuntimeError("the compressed cache was asked for entries twice in one step; it got no new ones")
        (keys, values), self._pending = self._pending, None
        if self.compressor is None:
            output = stock()
            positions = None if passed is None else passed.positions
            self._start(keys, values, visible, Prompt(query, scale, softcap, sinks, positions), passed)
            self._choose([0] * query.shape[0], tokens, visible)
            return output
        if not prefill:
            return self.compressor.decode(query, keys, values, scale=scale, softcap=softcap, sinks=sinks), None
        if visible is None:
            visible = torch.ones(keys.shape[0], tokens, dtype=torch.bool, device=keys.device)
        how: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        if passed is not None:
            how["passed"] = passed
        before = self.compressor.row_seen
        appended = self.compressor.append(query, keys, values, visible, **how)
        self._choose(before, tokens, visible)
        return appended, None

    def begin_reading(self) -> None:
        """Keep everything until `end_reading`: the chunks to come are one prompt.

        Raises:
            ValueError: if the layer holds entries already.
        """
        if self.seen:
            raise ValueError(f"the cache has seen {self.seen} tokens already; read into a new cache, or reset this one")
        if not self.keeps_all and self.pieces is not None:
            self._reading = Reading()

    def end_reading(self) -> None:
        """Compress what was read."""
        reading, self._reading = self._reading, None
        if reading is None or self.keys is None or self.values is None or reading.prompt is None:
            return
        keys, values = self.keys, self.values
        self.keys = self.values = None
        self._read_bytes = keys.nbytes + values.nbytes
        self._start(keys, values, reading.visible, reading.prompt, reading.passed)

    def _start(
        self, keys: Tensor, values: Tensor, visible: Tensor | None, prompt: Prompt, passed: Passed | None = None
    ) -> None:
        """Hand the prompt to a compressor, or keep it as a stock layer if a budget in bytes turns out to hold all."""
        batch, kv_heads, tokens, _ = keys.shape
        self.place.shard.check(kv_heads)
        if visible is None:
            visible = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device)
            row_prompt = [tokens] * batch
        else:
            row_prompt = visible.sum(-1).tolist() if passed is None else passed.row_seen
        if self.plan is None and self.pieces is not None:
            cost = layer_cost(self.pieces, self.grid, self.place, keys, prompt.query.shape[1], max(row_prompt))
            self.set_plan(layer_plan(self.pieces, self.budget, self.grid, self.place, cost))
        if self.plan is None or self.pieces is None or self.plan.keeps_all:
            self._append_dense(keys, values)
        elif isinstance(self.plan, ImagePlan):
            self.compressor = ImageCompressor(self.pieces, self.plan, keys, values, visible, row_prompt, self.pool)
        elif isinstance(self.plan, TextPlan):
            left = LeftPadded.of(keys, values, visible, prompt, None if passed is None else passed.positions)
            self._dense_bytes = left.keys.nbytes + left.values.nbytes
            self.compressor = TextCompressor(
                self.pieces,
                self.plan,
                left.keys,
                left.values,
                left.padding,
                row_prompt,
                left.prompt.asked(tokens, left.padding),
                self.pool,
                positions=left.positions,
                propagation=self.propagation if self._chooses else None,
            )

    def share_pool(self, pool: ModelPool) -> None:
        """Meet the other layers of the cache in `pool`."""
        self.pool = pool
        if self.compressor is not None:
            self.compressor.join(pool)

    def follow(self, propagation: Propagation | None) -> None:
        """Let some tokens go on only, as `propagation` says; None for all of them."""
        self.propagation = propagation
        if isinstance(self.compressor, TextCompressor):
            self.compressor.propagation = propagation if self._chooses else None

    @property
    def _chooses(self) -> bool:
        """Is this the layer that says which tokens go on?"""
        return self.propagation is not None and self.propagation.layer == self.place.index < self.place.count - 1

    @property
    def _incoming(self) -> Selection | None:
        """The tokens of the forward under way that reach this layer; None for all of them."""
        return None if self.propagation is None else self.propagation.incoming(self.place.index)

    def _choose(self, row_before: list[int], tokens: int, visible: Tensor | None) -> None:
        """After a prompt or chunk: say which of its tokens go on, if this layer does.

        Args:
            row_before: real tokens of each row before.
            tokens: columns of the prompt or chunk.
            visible: [B, T] bool, False for padding; None if there is none.
        """
        if not self._chooses or self.propagation is None or self.compressor is None:
            return
        if isinstance(self.plan, TextPlan):
            new = [after - before for after, before in zip(self.compressor.row_seen, row_before, strict=True)]
            self.propagation.choose(self.plan, row_before, new, tokens, visible)

    def _choose_reading(self, tokens: int, visible: Tensor | None) -> None:
        """The same while a prompt is being read."""
        if not self._chooses or self.propagation is None or self._reading is None or self.pieces is None:
            return
        if isinstance(self.plan, TextPlan) and self.keys is not None and self.values is not None:
            observed = observe_reading(self._reading, self.plan, self.keys, self.values)
            self.propagation.choose_reading(self.pieces.scorer, observed, self.plan, tokens, visible)

    def mask_for(self, selection: Selection, stock: Tensor | None) -> Tensor | None:
        """The mask of this layer's attention for a forward of which only some tokens come.

        Args:
            selection: those that come.
            stock: the mask for all of them.
        """
        if self.compressor is not None:
            return None  # it knows positions
        read = None if self._reading is None else self._reading.passed
        return chosen_mask(selection, None if read is None else read.visible, stock)

    def copy(self, *, evicts: bool) -> HeadKVLayer:
        """An independent layer with the same content; with `evicts=False` nothing ever leaves it."""
        twin = copy(self)
        for name in ("keys", "values", "padding"):
            tensor = getattr(self, name)
            setattr(twin, name, None if tensor is None else tensor.clone())
        if isinstance(self.compressor, TextCompressor):
            twin.compressor = self.compressor.copy(evicts=evicts)
        elif self.compressor is not None:
            twin.compressor = deepcopy(self.compressor)
        return twin

    def _append_dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # Exactly what a stock layer does, also at the first call, so that results are the same bit for bit.
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.new_empty(0), values.new_empty(0)
        self.keys, self.values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        return self.keys, self.values

    def _note_padding(self, visible: Tensor | None) -> None:
        if visible is not None:
            padding = (~visible).sum(-1, dtype=torch.int32)
            self.padding = padding if self.padding is None else self.padding + padding

    def _rows(self) -> int:
        if self.store is not None:
            return self.store.rows
        return 0 if self.keys is None else self.keys.shape[0]

    # What reports ask

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        tensors: list[Tensor | None] = [self.keys, self.values, self.padding]
        if self.compressor is not None:
            tensors.extend(self.compressor.tensors)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def nbytes_peak(self) -> int:
        """The most bytes that this layer held between two forwards since it was reset."""
        chosen = 0 if self.compressor is None else self.compressor.nbytes_peak
        return max(chosen, self.nbytes, self._read_bytes)

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the prompt's dense keys and values, which this layer held while it chose among them."""
        return self._dense_bytes

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock layer would hold after the same tokens, padding included."""
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
        if self._reading is not None and self._reading.passed is not None:
            return [[row[row >= 0].cpu().long()] * heads for row in self._reading.passed.positions]
        padding = [0] * rows if self.padding is None else self.padding.tolist()
        return [[torch.arange(self.seen - padding[row]) for _ in range(heads)] for row in range(rows)]
