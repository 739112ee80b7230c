# SPDX-License-Identifier: Apache-2.0
"""A thousand images leave nothing behind."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch

from headkv_mm import compress
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration


@pytest.mark.slow
def test_a_thousand_images_allocate_no_more_than_the_first_ones() -> None:
    torch.manual_seed(0)
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    words = {"pad_token_id": 32, "bos_token_id": 33, "boi_token_id": 34, "null_token_id": 35}
    config = LlamaGenConfig(
        text_config=text, image_height=6, image_width=3, codebook_size=32, max_prompt_length=4, patch_size=None, **words
    )
    model = LlamaGenForConditionalGeneration(config).eval()
    prompts = torch.full((20, 4), 33)

    def images(runs: int) -> None:
        with compress(model, "headkv", budget=0.4, grouping_rows=3) as session:
            for run in range(runs):
                model.generate(prompts, torch.ones_like(prompts), guidance_scale=1.5, seeds=[run] * 20)
                assert session.report().nbytes < session.report().nbytes_full

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    images(3)  # compiles kernels, fills caches
    before = tensors()
    tracemalloc.start()
    images(2)
    held, _ = tracemalloc.get_traced_memory()
    images(50)
    gc.collect()
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors() == before
    # Tensor memory belongs to tensors, which are counted; this is about everything else.
    assert now - held < 64 * 1024
