# SPDX-License-Identifier: Apache-2.0
"""One forward of a prompt that serves every method.

A prompt is read with full attention whatever the method is, so its queries, keys and values are the same for all of
them. They are recorded once; `replay` then shows them to a compressed cache, which chooses what to keep exactly as if
the model had just read the prompt into it. Times of such a cache mean nothing and are not reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from headkv_mm.attention import implementation_over
from headkv_mm.cache import HeadKVCache
from headkv_mm.evaluation.text.remembered import Scores, remembering
from headkv_mm.layer import LAYER_ATTRIBUTE, AttentionOutput


@dataclass(frozen=True)
class Call:
    """What one layer's attention was called with.

    Attributes:
        keys, values: [B, G, T, D], the new tokens' own.
        query: [B, H, T, D].
        mask: over everything seen so far, as transformers makes it, or None.
        scale, softcap, sinks: see `HeadKVLayer.attend`.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    mask: Tensor | None
    scale: float
    softcap: float
    sinks: Tensor | None


class RecordingLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A stock layer that remembers how its attention was called."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Call | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and lead the attention function here."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._new = (key_states, value_states)
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
        """The stock attention."""
        if self._new is None or self.call is not None:
            raise RuntimeError("a recording takes one prompt, in one forward")
        (keys, values), self._new = self._new, None
        self.call = Call(keys, values, query, mask, scale, softcap, sinks)
        return stock()


class Recording(Cache):  # type: ignore[misc,unused-ignore]
    """A stock cache for one prompt that remembers what its full-attention layers were called with.

    Args:
        model: its attention implementation becomes "headkv", which changes no result.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation is not None:
            config._attn_implementation = implementation_over(config._attn_implementation)
        self.scores: Scores = {}
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[RecordingLayer() if type(layer) is DynamicLayer else layer for layer in layers])


def replay(recording: Recording, cache: HeadKVCache) -> None:
    """Let an empty compressed cache take the recorded prompt, and choose what to keep.

    Raises:
        RuntimeError: if anything but one prompt was recorded.
    """
    for index, (layer, recorded) in enumerate(zip(cache.layers, recording.layers, strict=True)):
        if not isinstance(recorded, RecordingLayer):
            cache.layers[index] = copy.deepcopy(recorded)
            continue
        if recorded.call is None:
            raise RuntimeError("nothing was recorded: read a prompt into the recording first")
        call = recorded.call
        layer.update(call.keys, call.values)
        with remembering(layer, recording.scores):
            layer.attend(
                call.query,
                call.mask,
                scale=call.scale,
                stock=partial(_unread, call.query.transpose(1, 2)),  # [B, T, H, D], as an output has it
                softcap=call.softcap,
                sinks=call.sinks,
            )


def _unread(output: Tensor) -> AttentionOutput:
    """In place of the stock attention, whose output went on when the call was recorded."""
    return output, None
