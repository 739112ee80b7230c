# SPDX-License-Identifier: Apache-2.0
"""A random language model that speaks the words of the generated documents."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm.demo.text_tokenizer import build_text_tokenizer


@cache
def tokenizer() -> Any:
    return build_text_tokenizer()


def small_text_model(seed: int = 0, *, layers: int = 2, heads: int = 4, kv_heads: int = 2) -> LlamaForCausalLM:
    """Two thin layers with grouped heads, far from uniform attention, so that evictions matter."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()
