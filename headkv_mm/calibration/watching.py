# SPDX-License-Identifier: Apache-2.0
"""A stock cache that looks on while a model decodes: one attention row per head and step, never a whole map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from headkv_mm.attention import implementation_over
from headkv_mm.layer import LAYER_ATTRIBUTE, AttentionOutput


class WatchedLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A stock layer of one row that adds up how its heads look at one stretch of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.span: tuple[int, int] | None = None
        """First and last + 1 column that counts; None while nobody looks."""
        self.found: Tensor | None = None
        """[H] float32, the sum of `retrieval_mass` over the steps that were watched."""
        self.kv_heads = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and lead the attention function here."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # A fresh view: an attribute on the stored tensor would keep the layer alive in a cycle.
        keys = keys.view_as(keys)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

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
        """The stock attention; look on if this is a decoding step of interest."""
        if self.span is not None and query.shape[2] == 1:
            mass = retrieval_mass(
                query[0, :, 0], self.keys[0], self.span, scale=scale, mask=mask, softcap=softcap, sinks=sinks
            )
            self.found = mass if self.found is None else self.found + mass
            self.kv_heads = self.keys.shape[1]
        return stock()


def retrieval_mass(
    query: Tensor,
    keys: Tensor,
    span: tuple[int, int],
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """How much of a span a query finds: sum_i [entry i in the span] * a_i / n over the n entries it attends to most.

    n is the length of the span (arXiv 2410.19258, section 3.1). A head that gives all its attention to the span gets
    1/n, one that looks elsewhere 0.

    Args:
        query: [H, D], of one token.
        keys: [G, T, D].
        span: first column and the one after the last.
        scale: multiplies q.k.
        mask: [1, 1 or H, 1, T] bool or additive float, as the attention got it, or None; [1, T] of flash attention,
            which marks padding only, is ignored.
        softcap: of the logits, 0 for none.
        sinks: [H], learned logits in the denominator, or None.

    Returns:
        [H] float32.
    """
    first, end = span
    groups = keys.shape[0]
    grouped = query.float().unflatten(0, (groups, -1))  # [G, H / G, D]
    logits = (grouped @ keys.float().transpose(1, 2)).flatten(0, 1) * scale  # [H, T]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None and mask.dim() == 4:
        row = mask[0, :, -1, : logits.shape[-1]]  # [1 or H, T]
        logits = logits + row if row.is_floating_point() else logits.masked_fill(~row, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None]], dim=-1)
    attention = logits.softmax(-1)[:, : keys.shape[1]]
    best, columns = attention.topk(min(end - first, keys.shape[1]), dim=-1)
    inside = (columns >= first) & (columns < end)
    return torch.where(inside, best, 0.0).sum(-1) / (end - first)


class WatchedCache(Cache):  # type: ignore[misc,unused-ignore]
    """A stock cache for one row whose full-attention layers can be watched; use it within `watched`.

    Args:
        config: the model's text configuration.
    """

    def __init__(self, config: Any) -> None:
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[WatchedLayer() if type(layer) is DynamicLayer else layer for layer in layers])

    @property
    def watched_layers(self) -> list[WatchedLayer]:
        """The full-attention layers."""
        return [layer for layer in self.layers if isinstance(layer, WatchedLayer)]

    def watch(self, span: tuple[int, int]) -> None:
        """From now on count what decoding steps find in the columns of `span`."""
        for layer in self.watched_layers:
            layer.span = span

    def found(self) -> tuple[Tensor, int]:
        """What was counted, [L, H] float64 on the CPU, and the number of KV heads.

        Raises:
            ValueError: if the model's attention did not come by, or its layers differ in their heads.
        """
        found = [layer.found for layer in self.watched_layers]
        if not found or any(mass is None for mass in found):
            raise ValueError(
                "this model's attention cannot be watched: it has no full-attention layer, or does not go through "
                "transformers' attention interface"
            )
        shapes = {(len(mass), layer.kv_heads) for mass, layer in zip(found, self.watched_layers) if mass is not None}
        if len(shapes) > 1:
            raise ValueError("the layers of this model differ in their number of heads; no head table describes that")
        # Layers may lie on different devices.
        return torch.stack([mass.cpu() for mass in found if mass is not None]).double(), shapes.pop()[1]


@contextmanager
def watched(model: Any) -> Iterator[Any]:
    """While the context lasts the model's attention shows itself to a `WatchedCache`; its results stay the same.

    Yields:
        The model's text configuration.
    """
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    try:
        if before is not None:
            config._attn_implementation = implementation_over(before)
        yield config
    finally:
        config._attn_implementation = before
