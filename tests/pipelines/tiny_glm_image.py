# SPDX-License-Identifier: Apache-2.0
"""A tiny random GLM-Image: the whole diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel
from transformers.models.glm_image.processing_glm_image import GlmImageProcessor

from .characters import character_tokenizer

CODES, VISION = 96, 100
"""Codes of the picture, and ids that the model can write: behind the codes come the tokens around images."""

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|image|>{% endif %}"
    "{% endfor %}{% endfor %}"
)


class _SmallPreview(GlmImageProcessor):
    """A sixteenth of the preview, for speed. Older transformers have no such method, and the whole preview."""

    def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        *size, preview_height, preview_width = super()._get_target_shape(height=height, width=width)
        return (*size, -(-preview_height // 4), -(-preview_width // 4))


# The name is what a saved pipeline notes.
_SmallPreview.__name__, _SmallPreview.__module__ = GlmImageProcessor.__name__, GlmImageProcessor.__module__


def glm_image_processor(*, small_preview: bool) -> GlmImageProcessor:
    try:
        from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil as Pictures
    except ImportError:
        from transformers.models.glm_image.image_processing_glm_image import GlmImageImageProcessor as Pictures
    special = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
    tokenizer = character_tokenizer(special, first=[f"<code {code}>" for code in range(VISION)])
    kind = _SmallPreview if small_preview else GlmImageProcessor
    return kind(Pictures(), tokenizer, chat_template=_TEMPLATE)


def glm_image_model(processor: GlmImageProcessor) -> GlmImageForConditionalGeneration:
    """Random weights, wide enough that a wrong entry shows."""
    torch.manual_seed(0)
    ids = processor.tokenizer.get_vocab()
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "vision_vocab_size": VISION,
            "pad_token_id": ids["<pad>"],
            "eos_token_id": VISION - 3,
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1000.0},
            "initializer_range": 0.4,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 32,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8},
        image_token_id=ids["<|image|>"],
        image_start_token_id=VISION - 4,
        image_end_token_id=VISION - 3,
    )
    model = GlmImageForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = ids["<pad>"]
    return model


def glm_image_pipeline(*, small_preview: bool = True) -> Any:
    """A `GlmImagePipeline` whose pictures are small."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )

    processor = glm_image_processor(small_preview=small_preview)
    model = glm_image_model(processor)
    blocks = 4
    pipe = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        vision_language_encoder=model,
        vae=AutoencoderKL(
            block_out_channels=(4,) * blocks,
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        transformer=GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=CODES,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
