# SPDX-License-Identifier: Apache-2.0
"""Shapes of published language models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from headkv_mm.shapes.shape import Shape

if TYPE_CHECKING:
    from transformers import LlamaConfig, Qwen3Config


def _llama3(layers: int | None) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _qwen3(layers: int | None, *, width: int, inner: int, blocks: int, heads: int, tied: bool) -> Qwen3Config:
    """8 KV heads of 128 in all sizes."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=tied,
    )


def text_shapes() -> list[Shape]:
    """All of them."""
    sizes = [  # name, width, feed-forward width, blocks, query heads, embeddings tied, parameters
        ("0.6b", 1024, 3072, 28, 16, True, 596e6),
        ("1.7b", 2048, 6144, 28, 16, True, 1.72e9),
        ("4b", 2560, 9728, 36, 32, True, 4.02e9),
        ("8b", 4096, 12288, 36, 32, False, 8.19e9),
        ("14b", 5120, 17408, 40, 40, False, 14.77e9),
        ("32b", 5120, 25600, 64, 64, False, 32.76e9),
    ]
    return [
        Shape("llama-3-8b", "Llama-3-8B", _llama3, 8.03e9, "Llama-3-8B's configuration file and size"),
        *(
            Shape(
                f"qwen3-{name}",
                f"Qwen3-{name.upper()}",
                partial(_qwen3, width=width, inner=inner, blocks=blocks, heads=heads, tied=tied),
                parameters,
                f"Qwen3-{name.upper()}'s configuration and size as published with it",
            )
            for name, width, inner, blocks, heads, tied, parameters in sizes
        ),
    ]
