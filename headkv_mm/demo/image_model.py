# SPDX-License-Identifier: Apache-2.0
"""Sizes and starting weights of the embedded text-to-image model."""

from __future__ import annotations

import math

import torch
from torch import nn

from headkv_mm.demo.patches import EMPTY, FULL, patch_dictionary
from headkv_mm.demo.scenes import BACKGROUNDS, COLOURS, GRID_SIZE, PATCH_SIZE
from headkv_mm.demo.tokenizer import BOI, BOS, MAX_PROMPT_LENGTH, NULL, PAD, WORDS
from headkv_mm.llamagen.configuration import LlamaGenConfig
from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration


def word_ids() -> dict[str, int]:
    """Id of every caption word; the image codes come first."""
    return {word: patch_dictionary().size + index for index, word in enumerate(WORDS)}


def demo_config(layers: int = 5) -> LlamaGenConfig:
    """The embedded model's configuration: 5 blocks of width 128 with 4 heads, a 16x16 grid, 1.05 M parameters.

    Args:
        layers: number of blocks, for a model like it of another depth.
    """
    codes, ids = patch_dictionary().size, word_ids()
    return LlamaGenConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": codes + len(WORDS),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_PROMPT_LENGTH + GRID_SIZE**2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        image_height=GRID_SIZE,
        image_width=GRID_SIZE,
        codebook_size=codes,
        max_prompt_length=MAX_PROMPT_LENGTH,
        patch_size=PATCH_SIZE,
        learned_positions=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        boi_token_id=ids[BOI],
        null_token_id=ids[NULL],
    )


def build_untrained_model(seed: int, layers: int = 5) -> LlamaGenForConditionalGeneration:
    """The embedded model before training.

    Codes and words that show or name the same pattern, colour or background start with a shared random part, so that
    what is learned about one red patch carries over to the others.

    Args:
        seed: seed of the random start.
        layers: number of blocks; the embedded model has 5.

    Returns:
        A float32 model with the pixel codebook filled in.
    """
    config = demo_config(layers)
    model = LlamaGenForConditionalGeneration(config)
    dictionary = patch_dictionary()
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    depth = config.get_text_config().num_hidden_layers
    width = config.get_text_config().hidden_size
    with torch.no_grad():
        for name, module in model.model.language_model.layers.named_modules():
            if isinstance(module, nn.Linear):
                inputs = module.in_features
                into_stream = name.endswith(("o_proj", "down_proj"))
                scale = 0.25 / math.sqrt(inputs * depth) if into_stream else 0.5 / math.sqrt(inputs)
                module.weight.copy_(normal(module.out_features, inputs) * scale)

        patterns = sorted({pattern for pattern, _, _ in dictionary.factors})
        shared_pattern = {pattern: 0.1 * normal(width) for pattern in (EMPTY, FULL, *patterns)}
        shared_colour = 0.1 * normal(len(COLOURS), width)
        shared_background = 0.1 * normal(len(BACKGROUNDS), width)
        table = 0.05 * normal(dictionary.size + len(WORDS), width)
        for code, (pattern, colour, background) in enumerate(dictionary.factors):
            table[code] += shared_pattern[pattern]
            if colour is not None:
                table[code] += shared_colour[colour]
            if background is not None:
                table[code] += shared_background[background]
        ids = word_ids()
        for index, word in enumerate(COLOURS):
            table[ids[word]] += shared_colour[index]
        for index, word in enumerate(BACKGROUNDS):
            table[ids[word]] += shared_background[index]
        model.model.language_model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.copy_(0.2 * table[: dictionary.size])
        if model.model.positions is None or model.patch_decoder is None:
            raise RuntimeError("the embedded model needs learned positions and a pixel codebook")
        for embedding in (model.model.positions.slots, model.model.positions.rows, model.model.positions.columns):
            embedding.weight.copy_(0.1 * normal(*embedding.weight.shape))
        model.patch_decoder.codebook.copy_(torch.from_numpy(dictionary.codebook))
    return model
