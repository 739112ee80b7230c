# SPDX-License-Identifier: Apache-2.0
"""A tiny LlamaGen model: 20 codes, 4x3 image tokens, prompts of 6 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

CODES, PROMPT, HEIGHT, WIDTH = 20, 6, 4, 3
STEPS = HEIGHT * WIDTH
PAD, NULL, BOS, BOI = 20, 21, 22, 23


@pytest.fixture(scope="session")
def make_config() -> Callable[..., LlamaGenConfig]:
    """Makes the tiny configuration with some values changed."""
    return _config


def _config(**changes: Any) -> LlamaGenConfig:
    text = {
        "model_type": "llama",
        "vocab_size": CODES + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    settings = {
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "codebook_size": CODES,
        "max_prompt_length": PROMPT,
        "patch_size": 2,
        "learned_positions": True,
        "pad_token_id": PAD,
        "null_token_id": NULL,
        "bos_token_id": BOS,
        "boi_token_id": BOI,
    }
    return LlamaGenConfig(text_config={**text, **changes.pop("text_config", {})}, **{**settings, **changes})


@pytest.fixture(scope="session")
def model() -> LlamaGenForConditionalGeneration:
    torch.manual_seed(0)
    model = LlamaGenForConditionalGeneration(_config())
    model.eval()
    for parameter in model.parameters():  # large enough weights that every input matters
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.patch_decoder is not None
    model.patch_decoder.codebook.random_(0, 256)
    return model


@pytest.fixture(scope="session")
def prompts() -> torch.Tensor:
    """Three prompts of different lengths, padded on the left."""
    return torch.tensor([[PAD, PAD, BOS, 25, 26, BOI], [BOS, 24, 25, 26, 27, BOI], [PAD, PAD, PAD, BOS, 24, BOI]])


@pytest.fixture(scope="session")
def mask(prompts: torch.Tensor) -> torch.Tensor:
    """The attention mask of the prompts."""
    return (prompts != PAD).long()


@pytest.fixture(scope="session")
def teacher_forced(
    model: LlamaGenForConditionalGeneration,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Scores [B, 12, 20] of every image token in one pass without a cache, from prompts, their mask and the tokens."""

    @torch.no_grad()
    def run(prompts: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ids = torch.cat((prompts, tokens[:, :-1]), dim=1)
        full = torch.cat((mask, torch.ones_like(tokens[:, :-1])), dim=1)
        logits: torch.Tensor = model(ids, attention_mask=full, use_cache=False).logits
        return logits[:, PROMPT - 1 :]

    return run
