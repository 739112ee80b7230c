# SPDX-License-Identifier: Apache-2.0
"""HeadKVLayer: one layer's cache, as transformers sees it and as the "headkv" attention uses it.

transformers calls `update` with the new keys and values, then the attention function. What `update` got waits until the
attention function claims it, since only there the mask (which tokens are padding) and the query (which entries matter)
are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .budgets import Budget
from .chunk import visible_columns
from .following import Following, mask_for
from .image_grid import ImageGrid
from .layer_content import LayerContent
from .layer_plan import layer_cost, layer_plan
from .layer_start import compressor_of
from .model_pool import ModelPool
from .passed import Passed
from .plan import LayerPlace, Plan
from .prompt import Prompt, Reading
from .propagation import Propagation, Selection
from .registry import Pieces
from .text_compressor import TextCompressor

LAYER_ATTRIBUTE = "_headkv_layer"
"""Attribute of the key tensor that `update` returns; it leads the attention function to the layer."""

AttentionOutput = tuple[Tensor, Tensor | None]

_UNCLAIMED = (
    "this model's attention never asked the compressed cache for its entries: it does not run the 'headkv' attention. "
    "Use `with headkv_mm.compress(model, ...)`, or call model.set_attn_implementation('headkv') before generating. "
    "Models that do not go through transformers' attention interface cannot be compressed"
)


class HeadKVLayer(LayerContent):
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
        self.following = Following(place)
        """Which tokens go on after one of the layers; see `follow`."""
        self._clear()

    def _clear(self) -> None:
        self._empty()
        self.pool.clear()
        self.plan: Plan | None = None
        """None until known: a budget in bytes is divided when the batch is seen."""
        if self.pieces is not None and not isinstance(self.budget, str):
            self.set_plan(layer_plan(self.pieces, self.budget, self.grid, self.place))
        self._pending: tuple[Tensor, Tensor] | None = None

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

    # What transformers calls

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
        selection = self.following.incoming
        self.seen += key_states.shape[-2] if selection is None else selection.tokens
        if self.keeps_all or self._reading is not None:
            key_states, value_states = self._append_dense(key_states, value_states)
        else:
            self._pending = (key_states, value_states)
        # A fresh view: an attribute on a stored tensor would keep the layer alive in a cycle.
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER_ATTRIBUTE, self)
        return key_states, value_states

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

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive number is the length to keep (transformers < 5.15).

        Raises:
            ValueError: once entries were evicted, or for a cut into the prompt.
        """
        if self.following.propagation is not None and self._reading is not None:
            raise ValueError("a prompt that is being read by chosen tokens cannot be cropped; reset the cache instead")
        super().crop(tokens)

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
        selection = self.following.incoming
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
            if self.pieces is not None and self.keys is not None and self.values is not None:
                scorer, plan = self.pieces.scorer, self.plan
                self.following.choose_reading(self._reading, scorer, plan, self.keys, self.values, tokens, visible)
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
        else:
            self.compressor, self._dense_bytes = compressor_of(
                self.pieces,
                self.plan,
                keys,
                values,
                visible,
                row_prompt,
                prompt,
                pool=self.pool,
                passed=passed,
                chooser=self.following.chooser,
            )

    def share_pool(self, pool: ModelPool) -> None:
        """Meet the other layers of the cache in `pool`."""
        self.pool = pool
        if self.compressor is not None:
            self.compressor.join(pool)

    def follow(self, propagation: Propagation | None) -> None:
        """Let some tokens go on only, as `propagation` says; None for all of them."""
        self.following = Following(self.place, propagation)
        if isinstance(self.compressor, TextCompressor):
            self.compressor.propagation = self.following.chooser

    @property
    def propagation(self) -> Propagation | None:
        """What says which tokens go on after one of the layers; None where all do."""
        return self.following.propagation

    def _choose(self, row_before: list[int], tokens: int, visible: Tensor | None) -> None:
        if self.compressor is not None:
            self.following.choose(self.plan, row_before, self.compressor.row_seen, tokens, visible)

    def mask_for(self, selection: Selection, stock: Tensor | None) -> Tensor | None:
        """The mask of this layer's attention for a forward of which only some tokens come; see `following.mask_for`."""
        if self.compressor is not None:
            return None  # it knows positions
        return mask_for(selection, self._reading, stock)
