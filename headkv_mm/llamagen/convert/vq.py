# SPDX-License-Identifier: Apache-2.0
"""The published VQ tokenizer's weights under the names of transformers' `JanusVQVAE`."""

from __future__ import annotations

import re
from typing import Any

import torch

from headkv_mm.llamagen.convert.checkpoint import Checkpoint

_RENAMED = (
    (re.compile(r"^encoder\.conv_blocks\.(\d+)\.res\."), r"encoder.down.\1.block."),
    (re.compile(r"^encoder\.conv_blocks\.(\d+)\."), r"encoder.down.\1."),
    (re.compile(r"^decoder\.conv_blocks\.(\d+)\.res\."), r"decoder.up.\1.block."),
    (re.compile(r"^decoder\.conv_blocks\.(\d+)\."), r"decoder.up.\1."),
    (re.compile(r"^(encoder|decoder)\.mid\.0\."), r"\1.mid.block_1."),
    (re.compile(r"^(encoder|decoder)\.mid\.1\."), r"\1.mid.attn_1."),
    (re.compile(r"^(encoder|decoder)\.mid\.2\."), r"\1.mid.block_2."),
)
_STATISTICS = "quantize.codebook_used"  # counts of training


def vq_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a `JanusVQVAEConfig` from the shapes; `num_patches` is not among them.

    Raises:
        ValueError: if the file holds no VQ tokenizer.
    """
    codes, size = checkpoint.shape("quantize.embedding.weight")
    base, channels = checkpoint.shape("encoder.conv_in.weight")[:2]
    levels = _count(checkpoint, r"encoder\.conv_blocks\.(\d+)\.")
    widths = [checkpoint.shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0] for level in range(levels)]
    return {
        "model_type": "janus_vqgan",
        "embed_dim": size,
        "num_embeddings": codes,
        "latent_channels": checkpoint.shape("quant_conv.weight")[1],
        "in_channels": channels,
        "out_channels": checkpoint.shape("decoder.conv_out.weight")[0],
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": _count(checkpoint, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
    }


def take_vq(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All weights in float32 under the names of `JanusVQVAE`; training's statistics are left out."""
    checkpoint.leave_out(_STATISTICS)
    return {_renamed(name): checkpoint.take(name).float() for name in checkpoint.names}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name, found = pattern.subn(replacement, name)
        if found:
            break
    return name


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """One more than the largest number that the pattern finds at the start of a name."""
    return 1 + max((int(match[1]) for name in checkpoint.names if (match := re.match(pattern, name))), default=-1)
