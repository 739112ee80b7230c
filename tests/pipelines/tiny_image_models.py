# SPDX-License-Identifier: Apache-2.0
"""Tiny random image models of other people's architectures, with tokenizers of one token per character."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import processors

from .characters import character_tokenizer


def letters(special: dict[str, str], first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> Any:
    """A tokenizer of characters that writes <s> first, as those of the published models do."""
    tokenizer = character_tokenizer(special, first, last)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def sharpen(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Weights wide enough that tokens depend on the prompt and on what the cache holds."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=std)


def janus(grid: int = 6, codes: int = 32) -> tuple[Any, Any]:
    """Model and processor; images of grid x grid tokens."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusImageProcessor, JanusProcessor

    tokenizer = letters({"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": grid * 4,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": grid * grid,
            "mlp_ratio": 2.0,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": codes,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": grid,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = JanusForConditionalGeneration(config).eval()
    sharpen(model.model.language_model)
    sharpen(model.model.generation_head, std=1.0)
    sharpen(model.model.generation_embeddings, std=1.0)
    sharpen(model.model.generation_aligner, std=0.5)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, 2
    settings.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids("<boi>")}
    settings.guidance_scale = 3.0
    sizes = {"height": grid * 4, "width": grid * 4}
    image_processor = JanusImageProcessor(size=sizes, do_resize=True, min_size=4)
    return model, JanusProcessor(image_processor, tokenizer, num_image_tokens=grid * grid)


def chameleon(side: int = 6, codes: int = 24) -> tuple[Any, Any]:
    """Model and processor; Anole's images have side x side tokens, Lumina-mGPT's up to 16 x 16."""
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
    )

    # Ids run against the codes, so that a mix-up shows.
    images = [f"IMGIMG{code_letters(code)}Z" for code in reversed(range(codes))]
    special = {
        "image_token": "<image>",
        "boi_token": "<racm3:break>",
        "eoi_token": "<eoss>",
        "sep_token": "<reserved08706>",
    }
    named = {name: word for name, word in special.items() if name != "sep_token"}
    words = ["<reserved08706>", "<reserved08799>", *(f"<reserved{8800 + count:05d}>" for count in range(1, 9))]
    tokenizer = letters(named, first=tuple(images), last=("\n", ":", *words))
    tokenizer.add_special_tokens({"sep_token": special["sep_token"]})
    config = ChameleonConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocabulary_map=tokenizer.get_vocab(),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": codes,
            "latent_channels": 32,
            "resolution": side * 2,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    model = ChameleonForConditionalGeneration(config).eval()
    sharpen(model.model.layers, std=1.5)
    sharpen(model.model.embed_tokens, std=0.5)
    sharpen(model.lm_head, std=1.0)
    processor = ChameleonProcessor(ChameleonImageProcessor(), tokenizer, image_seq_length=side * side)
    return model, processor


def code_letters(code: int) -> str:
    """A code as Chameleon's vocabulary writes it: 12 is BC."""
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))
