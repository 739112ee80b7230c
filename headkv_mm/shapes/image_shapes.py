# SPDX-License-Identifier: Apache-2.0
"""Shapes of published autoregressive image models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from headkv_mm.image_grid import ImageGrid
from headkv_mm.shapes.shape import Shape

if TYPE_CHECKING:
    from transformers import ChameleonConfig, Emu3Config, GlmImageConfig, JanusConfig

    from headkv_mm.llamagen import LlamaGenConfig

_PROMPT = 64
"""Prompt tokens that plans assume where the model does not fix them: a caption of one or two sentences."""


def _llamagen(layers: int | None, *, blocks: int, heads: int, side: int, captions: bool) -> LlamaGenConfig:
    """Heads of 64, and a feed-forward width of 8/3, rounded up to 256."""
    from headkv_mm.llamagen import LlamaGenConfig

    codes, width = 16384, 64 * heads
    # A prompt is one of 1000 classes or the null class; captions come as 120 features of a text encoder.
    prompt: dict[str, Any] = (
        {"conditioning": "text", "feature_size": 2048, "max_prompt_length": 120}
        if captions
        else {"conditioning": "class", "num_classes": 1000, "max_prompt_length": 1}
    )
    return LlamaGenConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": codes + (0 if captions else 1001),
            "hidden_size": width,
            "intermediate_size": -(-(8 * width // 3) // 256) * 256,
            "num_hidden_layers": layers or blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": 64,
            "max_position_embeddings": prompt["max_prompt_length"] + side * side,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        image_height=side,
        image_width=side,
        codebook_size=codes,
        prompt_rotary=False,
        vq_config={"num_patches": side},
        **prompt,
    )


def _janus(layers: int | None, *, blocks: int, heads: int, width: int, inner: int) -> JanusConfig:
    from transformers import JanusConfig

    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers or blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 16384,
            "pad_token_id": 100015,
        },
        vision_config={"projection_dim": width, "image_size": 384, "num_image_tokens": 576},
        vq_config={"projection_dim": width, "image_token_embed_dim": width},
        # The checkpoints hold a text head of their own.
        tie_word_embeddings=False,
    )


def _chameleon(layers: int | None) -> ChameleonConfig:
    from transformers import ChameleonConfig

    # 8192 image codes from id 4 on, named as transformers reads them: digits are letters, Z ends the name.
    names = {f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": code + 4 for code in range(8192)}
    # Reserved words follow; Lumina-mGPT means an image's size and the end of a row by some of them.
    reserved = {f"<reserved{number:05d}>": number + 4 for number in range(8706, 8900)}
    special = {"<eoss>": 8196, "<racm3:break>": 8197, "<image>": 8711}
    return ChameleonConfig(
        vocab_size=65536,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=10240,
        vocabulary_map={**names, **reserved, **special},
        vq_config={},
    )


def _emu3(layers: int | None) -> Emu3Config:
    from transformers import Emu3Config

    names = {f"<|visual token {code:06d}|>": code + 151854 for code in range(32768)}
    return Emu3Config(
        text_config={
            "vocab_size": 184622,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": layers or 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 9216,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        vq_config={},
        vocabulary_map={**names, "<|extra_200|>": 151846, "<image>": 151851},
    )


def _glm_image(layers: int | None) -> GlmImageConfig:
    from transformers import GlmImageConfig

    config = GlmImageConfig(text_config={}, vision_config={}, vq_config={})
    # What its own configuration class takes for granted are the published sizes.
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    return config


def _llamagen_shapes() -> list[Shape]:
    sizes = [  # name, blocks, heads, published parameters
        ("b", 12, 12, 111e6),
        ("l", 24, 16, 343e6),
        ("xl", 36, 20, 775e6),
        ("xxl", 48, 24, 1.4e9),
    ]
    common: dict[str, Any] = {
        "guided": True,
        "apart": ("vq_model",),
        "source": "GPT-B to GPT-XXL in LlamaGen's own code (arXiv 2406.06525)",
    }
    shapes = [
        Shape(
            f"llamagen-{name}-{16 * side}",
            f"LlamaGen-{name.upper()}, class-conditional, {16 * side} x {16 * side} pixels",
            partial(_llamagen, blocks=blocks, heads=heads, side=side, captions=False),
            parameters,
            grid=ImageGrid(side, side),
            condition=1,
            **common,
        )
        for name, blocks, heads, parameters in sizes
        for side in (16, 24)
    ]
    shapes += [
        Shape(
            f"llamagen-xl-t2i-{16 * side}",
            f"LlamaGen-XL, text-conditional, {16 * side} x {16 * side} pixels",
            partial(_llamagen, blocks=36, heads=20, side=side, captions=True),
            775e6,
            grid=ImageGrid(side, side),
            condition=120,
            **common,
        )
        for side in (16, 32)
    ]
    return shapes


def image_shapes() -> list[Shape]:
    """All of them."""
    guided: dict[str, Any] = {"guided": True, "condition": _PROMPT}
    lumina: dict[str, Any] = {
        "source": "Chameleon-7B's configuration in transformers, which Lumina-mGPT (arXiv 2408.02657) starts from",
        "unconfirmed": "Lumina-mGPT's own configuration file",
    }
    return [
        *_llamagen_shapes(),
        Shape(
            "janus-pro-1b",
            "Janus-Pro-1B, 384 x 384 pixels",
            partial(_janus, blocks=24, heads=16, width=2048, inner=5632),
            2.09e9,
            "sizes of DeepSeek-LLM-1.5B and of transformers' JanusConfig (arXiv 2501.17811)",
            ImageGrid(24, 24),
            unconfirmed="the language model's sizes: only the number of parameters was compared",
            **guided,
        ),
        Shape(
            "janus-pro-7b",
            "Janus-Pro-7B, 384 x 384 pixels",
            partial(_janus, blocks=30, heads=32, width=4096, inner=11008),
            7.42e9,
            "DeepSeek-LLM-7B's configuration and transformers' JanusConfig (arXiv 2501.17811)",
            ImageGrid(24, 24),
            **guided,
        ),
        Shape(
            "lumina-mgpt-768",
            "Lumina-mGPT-7B, 768 x 768 pixels",
            _chameleon,
            7e9,
            grid=ImageGrid(48, 48, row_stride=49),
            **lumina,
            **guided,
        ),
        Shape(
            "lumina-mgpt-1024",
            "Lumina-mGPT-7B, 1024 x 1024 pixels",
            _chameleon,
            7e9,
            grid=ImageGrid(64, 64, row_stride=65),
            **lumina,
            **guided,
        ),
        Shape(
            "emu3",
            "Emu3-Gen (8B), 720 x 720 pixels",
            _emu3,
            8.49e9,
            "Emu3's configuration file (arXiv 2409.18869)",
            ImageGrid(90, 90, row_stride=91),
            apart=("vqmodel",),
            **guided,
        ),
        Shape(
            "glm-image",
            "GLM-Image's autoregressive stage (9B), 1024 x 1024 pixels",
            _glm_image,
            9e9,
            "transformers' GlmImageConfig and its documentation",
            # A preview of 16 x 16 tokens comes first and is condition.
            ImageGrid(32, 32, start=256),
            condition=_PROMPT,
            apart=("visual", "vqmodel"),
        ),
    ]
