# SPDX-License-Identifier: Apache-2.0
"""The attention and mask functions that are registered with transformers.

With any cache but ours they are the stock attention, bit for bit, so a model may stay on "headkv". The stock
implementation to fall back to is part of the name: "headkv" stands on "sdpa", "headkv_eager" on "eager", and so on. No
state is kept anywhere but in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .layer import LAYER_ATTRIBUTE, AttentionOutput, HeadKVLayer

NAME = "headkv"
_DEFAULT_BASE = "sdpa"


def implementation_over(base: str) -> str:
    """The registered name of our attention over a stock implementation, registering it if it is new.

    Args:
        base: "sdpa", "eager", "flash_attention_2", ... A name of ours is returned as it is.

    Raises:
        ValueError: if transformers has no such implementation.
    """
    if is_ours(base):
        return base
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(f"attention implementation {base!r} is unknown to transformers; use 'sdpa' or 'eager'")
    name = NAME if base == _DEFAULT_BASE else f"{NAME}_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(headkv_attention, base=base))
        AttentionMaskInterface.register(name, partial(headkv_mask, base=base))
    return name


def is_ours(implementation: str | None) -> bool:
    """True for "headkv" and its variants over other stock implementations."""
    return implementation == NAME or (implementation or "").startswith(f"{NAME}_")


def register() -> None:
    """Register "headkv" over "sdpa". May run more than once."""
    implementation_over(_DEFAULT_BASE)


def headkv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    base: str,
    **kwargs: Any,
) -> AttentionOutput:
    """Attention over a compressed cache; the stock attention where there is none.

    Args:
        module: the attention module that calls.
        query: [B, H, T, D].
        key, value: [B, G, T', D], what the cache's `update` returned.
        attention_mask: the stock mask for the full sequence.
        scaling: multiplies q.k; 1/sqrt(D) if None.
        dropout: passed on to the stock attention.
        base: the stock implementation.
        kwargs: passed on; `softcap` and `s_aux` (sinks) are used.
    """

    def stock() -> AttentionOutput:
        function = _stock_attention(base, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    layer: HeadKVLayer | None = getattr(key, LAYER_ATTRIBUTE, None)
    if layer is None:
        return stock()
    return layer.attend(
        query,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        stock=stock,
        # The stock sdpa attention knows no softcap either; a compressed step must compute what the prompt's did.
        softcap=(kwargs.get("softcap") or 0.0) if base != _DEFAULT_BASE else 0.0,
        sinks=kwargs.get("s_aux"),
    )


def headkv_mask(*args: Any, base: str, **kwargs: Any) -> Tensor | None:
    """The stock mask of the base implementation."""
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
    return mask


def _stock_attention(base: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    if base == "eager":
        # Eager attention is not in the registry: every modeling file has its own.
        function: Callable[..., AttentionOutput] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    registered: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS[base]
    return registered
