# SPDX-License-Identifier: Apache-2.0
"""The embedded language model: its configuration and its weights before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headkv_mm.demo.text_tokenizer import BOS, EOS, MAX_LENGTH, PAD, TOKENS

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

ROPE_THETA = 2e5  # slow enough that a third of the channels barely turn within 2048 tokens
LOOK_BACK_OFFSETS = (1, 2, 3, 4, 5)
_FAST_CHANNELS = 6  # rotary pairs that tell neighbouring offsets apart


def text_config() -> LlamaConfig:
    """Configuration of the embedded model: 1.1 M parameters, 4 layers, 8 query heads on 4 KV heads of size 32."""
    from transformers import LlamaConfig

    ids = {token: TOKENS.index(token) for token in (PAD, BOS, EOS)}
    return LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )


def build_untrained_text_model(seed: int) -> LlamaForCausalLM:
    """The model before training, in float32; some heads of the first layer start by looking a few tokens back."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = text_config()
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    last = name.endswith(("o_proj.weight", "down_proj.weight"))
                    parameter.normal_(0, 0.02 / (2 * config.num_hidden_layers) ** 0.5 if last else 0.02)
            _look_back(model)
    return model


def _look_back(model: LlamaForCausalLM, sharpness: float = 5.5) -> None:
    """Add rank-one terms that make the first heads of layer 0 attend a fixed number of tokens back.

    All embeddings get a common direction. Queries and keys map it to a vector whose product, once rotary positions have
    turned both, is largest at the wanted offset. It is a start only, everything is trained; without it a model this
    small does not find the way to look a name up within minutes.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    half, group = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads
    common = torch.randn(config.hidden_size).sign() * 0.02
    model.model.embed_tokens.weight.add_(common)
    unit = common / common.norm()
    # After the norm an embedding has about sqrt(hidden_size / 2) along the common direction.
    gain = sharpness / (config.hidden_size / 2) ** 0.5
    speed = ROPE_THETA ** -(torch.arange(_FAST_CHANNELS) / half)  # radians per token
    key = torch.zeros(config.head_dim)
    key[:_FAST_CHANNELS] = 1
    for head, offset in enumerate(LOOK_BACK_OFFSETS):
        query = torch.zeros(config.head_dim)
        query[:_FAST_CHANNELS] = torch.cos(offset * speed)
        query[half : half + _FAST_CHANNELS] = -torch.sin(offset * speed)
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        attention.q_proj.weight[rows].add_(gain * torch.outer(query, unit))
    for kv_head in range((len(LOOK_BACK_OFFSETS) + group - 1) // group):
        rows = slice(kv_head * config.head_dim, (kv_head + 1) * config.head_dim)
        attention.k_proj.weight[rows].add_(gain * torch.outer(key, unit))
    attention.v_proj.weight.mul_(2)
    attention.o_proj.weight.mul_(3)
