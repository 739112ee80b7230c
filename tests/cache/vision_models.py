# SPDX-License-Identifier: Apache-2.0
"""Tiny models that answer about images, and two questions of different lengths."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

PAD, IMAGE, BEGIN, END = 0, 3, 5, 6
PATCH = 4
GRIDS = ((1, 8, 12), (1, 8, 8))
"""Patches of the two images; four of them are one token."""

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
_VISION: dict[str, Any] = {"num_heads": 2, "patch_size": PATCH, "initializer_range": 0.3}
_NEWER: dict[str, Any] = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen2VL": ("Qwen2VL", {}, {"depth": 1, "embed_dim": 32, "hidden_size": 64}),
    "Qwen2_5_VL": (
        "Qwen2_5_VL",
        {},
        {**_NEWER, "depth": 1, "window_size": 16, "fullatt_block_indexes": [0]},
    ),
    "Qwen3VL": (
        "Qwen3VL",
        {"head_dim": 8},
        {**_NEWER, "depth": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
}


def vision_model(family: str, **more: Any) -> Any:
    """Random weights, sharp enough that tokens depend on what the cache holds."""
    torch.manual_seed(0)
    name, text, vision = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, **text, **more},
        vision_config={**_VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    return model


def questions() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of two questions about an image each, padded on the left; and the second one alone."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for grid, words in zip(GRIDS, (12, 9), strict=True):
        picture = torch.full((grid[1] * grid[2] // 4,), IMAGE)
        asked = torch.randint(7, 120, (words,), generator=generator)
        rows.append(torch.cat([torch.tensor([10, BEGIN]), picture, torch.tensor([END]), asked]))
    patches = [torch.randn(h * w, 3 * 2 * PATCH**2, generator=generator) for _, h, w in GRIDS]
    width = len(rows[0])
    padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return _inputs(padded, patches, GRIDS), _inputs(rows[1][None], patches[1:], GRIDS[1:])


def _inputs(ids: Tensor, patches: list[Tensor], grids: Any) -> dict[str, Tensor]:
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
    }
