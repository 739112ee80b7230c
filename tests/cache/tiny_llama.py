# SPDX-License-Identifier: Apache-2.0
"""Models for methods that look at a model's weights, where the test itself makes keys and values."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@lru_cache(maxsize=32)
def tiny_llama(layers: int, heads: int, kv_heads: int, head_dim: int) -> LlamaForCausalLM:
    """Random weights of the given shape."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=heads * head_dim,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()
