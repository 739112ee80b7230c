# SPDX-License-Identifier: Apache-2.0
"""Several compressed caches that a model serves in one forward.

Answers are short and models of an evaluation are small, so that most of the time goes into calling the model, not into
its arithmetic. The caches of several compressions, which hold the same documents, therefore take each token together:
every layer hands each cache its rows. No cache sees another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from headkv_mm.cache import HeadKVCache
from headkv_mm.layer import LAYER_ATTRIBUTE, AttentionOutput, HeadKVLayer


def can_join(cache: HeadKVCache) -> bool:
    """Whether all layers of a cache attend by themselves; those that keep everything leave that to the model.

    Where only chosen tokens go on to later layers, the model's layers must know the cache itself.
    """
    return cache.propagation is None and all(
        isinstance(layer, HeadKVLayer) and not layer.keeps_all for layer in cache.layers
    )


class JoinedLayer(CacheLayerMixin):
    """The same layer of several caches, each with the same number of rows."""

    is_sliding = False
    is_compileable = False

    def __init__(self, parts: Sequence[HeadKVLayer]) -> None:
        super().__init__()
        self.parts = list(parts)
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is held here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take [P * B, G, T, D] keys and values of all parts, and lead the attention function here."""
        self._new = (key_states, value_states)
        keys = key_states.view_as(key_states)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, value_states

    def attend(self, query: Tensor, mask: Tensor | None, **how: Any) -> AttentionOutput:
        """Every part attends over what it holds; arguments as of `HeadKVLayer.attend`."""
        if self._new is None:
            raise RuntimeError("the attention was called twice for one update of the cache")
        count, (keys, values), self._new = len(self.parts), self._new, None
        masks = [None] * count if mask is None else mask.expand(query.shape[0], -1, -1, -1).chunk(count)
        outputs = []
        rows = zip(self.parts, query.chunk(count), keys.chunk(count), values.chunk(count), masks, strict=True)
        for part, part_query, part_keys, part_values, part_mask in rows:
            part.update(part_keys, part_values)
            outputs.append(part.attend(part_query, part_mask, **how)[0])
        return torch.cat(outputs), None

    def get_seq_length(self) -> int:
        """Tokens seen; the same in all parts."""
        return self.parts[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask."""
        return self.parts[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.14


class JoinedCache(Cache):
    """Caches of P compressions over the same B documents, as one cache of P * B rows, part after part.

    Args:
        caches: that `can_join`.
    """

    def __init__(self, caches: Sequence[HeadKVCache]) -> None:
        layers = zip(*(cache.compressed_layers for cache in caches), strict=True)
        super().__init__(layers=[JoinedLayer(parts) for parts in layers])

    def keep_parts(self, parts: Sequence[int]) -> None:
        """Let go of all parts but these, which stay in their order."""
        for layer in self.layers:
            layer.parts = [layer.parts[part] for part in parts]
