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

Measure = Callable[[Tensor, tuple[int, int]], Tensor]
"""From attention rows [H, T] and a span to numbers [H]."""


class WatchedLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A stock layer of one row that adds up how its heads look at one stretch of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.span: tuple[int, int] | None = None
        """First and last + 1 column that counts; None while nobody looks."""
        self.measure: Measure = retrieved
        self.latest: Tensor | None = None
        """[H] float32, what the newest step found."""
        self.found: Tensor | None = None
        """[H] float32, the sum of what was found over the steps that count."""
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
            rows = attention_rows(query[0, :, 0], self.keys[0], scale=scale, mask=mask, softcap=softcap, sinks=sinks)
            self.latest = self.measure(rows, self.span)
            self.kv_heads = self.keys.shape[1]
        return stock()

    def count(self) -> None:
        """Add what the newest step found."""
        if self.latest is not None:
            self.found = self.counted + self.latest

    @property
    def counted(self) -> Tensor:
        """What was found in the steps that count, [H].

        Raises:
            RuntimeError: if nobody looked yet.
        """
        if self.latest is None:
            raise RuntimeError("nothing was watched yet")
        return torch.zeros_like(self.latest) if self.found is None else self.found


def attention_rows(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention of one token.

    Args:
        query: [H, D], of one token.
        keys: [G, T, D].
        scale: multiplies q.k.
        mask: [1, 1 or H, 1, T] bool or additive float, as the attention got it, or None; [1, T] of flash attention,
            which marks padding only, is ignored.
        softcap: of the logits, 0 for none.
        sinks: [H], learned logits in the denominator, or None.

    Returns:
        [H, T] float32.
    """
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
    attention: Tensor = logits.softmax(-1)[:, : keys.shape[1]]
    return attention


def retrieved(attention: Tensor, span: tuple[int, int]) -> Tensor:
    """How much of a span a query finds: sum_i [entry i in the span] * a_i / n over the n entries it attends to most.

    n is the length of the span (arXiv 2410.19258, section 3.1). A head that gives all its attention to the span gets
    1/n, one that looks elsewhere 0.

    Args:
        attention: [H, T], rows that sum to 1.
        span: first column and the one after the last.

    Returns:
        [H] float32.
    """
    first, end = span
    best, columns = attention.topk(min(end - first, attention.shape[-1]), dim=-1)
    inside = (columns >= first) & (columns < end)
    return torch.where(inside, best, 0.0).sum(-1) / (end - first)


def span_mass(attention: Tensor, span: tuple[int, int]) -> Tensor:
    """All the attention that a span gets (arXiv 2508.02401), [H] float32 of [H, T]."""
    return attention[:, span[0] : span[1]].sum(-1)


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

    def watch(self, span: tuple[int, int], measure: Measure = retrieved) -> None:
        """From now on look at what decoding steps find in the columns of `span`."""
        for layer in self.watched_layers:
            layer.span, layer.measure = span, measure

    def count(self) -> None:
        """Count what the newest step has found."""
        for layer in self.watched_layers:
            layer.count()

    def found(self) -> tuple[Tensor, int]:
        """What was counted, [L, H] float64 on the CPU, and the number of KV heads.

        Raises:
            ValueError: if the model's attention did not come by, or its layers differ in their heads.
        """
        layers = self.watched_layers
        if not layers or any(layer.latest is None for layer in layers):
            raise ValueError(
                "this model's attention cannot be watched: it has no full-attention layer, or does not go through "
                "transformers' attention interface"
            )
        # Layers may lie on different devices.
        found = [layer.counted.double().cpu() for layer in layers]
        shapes = {(len(mass), layer.kv_heads) for mass, layer in zip(found, layers)}
        if len(shapes) > 1:
            raise ValueError("the layers of this model differ in their number of heads; no head table describes that")
        return torch.stack(found), shapes.pop()[1]


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
