# SPDX-License-Identifier: Apache-2.0
"""The published transformer's weights under our names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headkv_mm.llamagen.convert.checkpoint import Checkpoint

HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
"""Heads of the published sizes: B, L, XL, XXL, 1B, XXXL, 3B, 7B."""
_LABELS = "cls_embedding.embedding_table.weight"
_NULL_FEATURES = "cls_embedding.uncond_embedding"
_LAYER = re.compile(r"layers\.(\d+)\.")
_THETA = 10000.0
_PLAIN = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


@dataclass(frozen=True)
class TransformerSizes:
    """What the shapes of a checkpoint say.

    Attributes:
        kind: "class" or "text".
        layers, width, heads, kv_heads, feed_forward: of the blocks.
        codes: image codes.
        condition: prompt columns.
        classes: number of classes, the null class not counted; None without.
        feature_size: width of text features; None without.
    """

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    codes: int
    condition: int
    classes: int | None
    feature_size: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, kind: str | None = None, heads: int | None = None) -> TransformerSizes:
        """Read the shapes.

        Args:
            checkpoint: of the transformer.
            kind: what the user says it is; by default what it holds.
            heads: number of attention heads; by default that of the published model of this width.

        Raises:
            ValueError: for another kind, an unknown width without `heads`, or shapes that do not fit together.
        """
        found = "class" if _LABELS in checkpoint else "text" if _NULL_FEATURES in checkpoint else None
        if found is None:
            raise ValueError(
                f"{checkpoint.path} is no LlamaGen transformer: it has neither {_LABELS} nor {_NULL_FEATURES}"
            )
        if kind not in (None, found):
            raise ValueError(f"{checkpoint.path} is a {found}-conditional checkpoint, not a {kind}-conditional one")
        codes, width = checkpoint.shape("tok_embeddings.weight")
        layers = 1 + max((int(match[1]) for name in checkpoint.names if (match := _LAYER.match(name))), default=-1)
        if heads is None and width not in HEADS_OF_WIDTH:
            raise ValueError(f"no published LlamaGen model has width {width}: say how many heads it has with --heads")
        heads = heads or HEADS_OF_WIDTH[width]
        head_size, odd = divmod(width, heads)
        groups = checkpoint.shape("layers.0.attention.wqkv.weight")[0] / max(head_size, 1) - heads
        if odd or head_size % 4 or groups < 2 or groups % 2 or heads % (groups / 2):
            raise ValueError(f"{heads} heads do not divide a width of {width} and its projections: check --heads")
        return cls(
            kind=found,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=int(groups) // 2,
            feed_forward=checkpoint.shape("layers.0.feed_forward.w1.weight")[0],
            codes=codes,
            condition=1 if found == "class" else checkpoint.shape(_NULL_FEATURES)[0],
            classes=checkpoint.shape(_LABELS)[0] - 1 if found == "class" else None,
            feature_size=checkpoint.shape(_NULL_FEATURES)[1] if found == "text" else None,
        )

    def config(self, grid: int, vq_config: Any) -> Any:
        """Our configuration for images of `grid` x `grid` tokens."""
        from headkv_mm.llamagen.configuration import LlamaGenConfig

        return LlamaGenConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": self.codes + (0 if self.classes is None else self.classes + 1),
                "hidden_size": self.width,
                "intermediate_size": self.feed_forward,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.width // self.heads,
                "max_position_embeddings": self.condition + grid * grid,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
                "bos_token_id": None,
                "eos_token_id": None,
            },
            image_height=grid,
            image_width=grid,
            codebook_size=self.codes,
            max_prompt_length=self.condition,
            conditioning=self.kind,
            num_classes=self.classes,
            feature_size=self.feature_size,
            prompt_rotary=False,
            vq_config=vq_config,
        )


def grid_in(checkpoint: Checkpoint, sizes: TransformerSizes) -> int | None:
    """Side of the image in tokens if the checkpoint holds its table of rotary angles, which is then taken.

    Raises:
        ValueError: if the table is not the one that our model computes.
    """
    if "freqs_cis" not in checkpoint:
        return None
    table = checkpoint.take("freqs_cis").float()  # [P + grid^2, head_size / 2, 2]
    grid = math.isqrt(max(len(table) - sizes.condition, 0))
    quarter = sizes.width // sizes.heads // 4
    angles = torch.arange(grid)[:, None] * _THETA ** (-torch.arange(quarter) / quarter)  # [grid, head_size / 4]
    both = torch.cat((angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)), dim=-1)
    expected = torch.cat((table.new_zeros(sizes.condition, 2 * quarter, 2), torch.stack((both.cos(), both.sin()), -1)))
    if table.shape != expected.shape or not torch.allclose(table, expected, atol=2e-2):  # may be in half precision
        raise ValueError(
            f"{checkpoint.path} has rotary angles (freqs_cis) that are not LlamaGen's: nothing was converted"
        )
    return grid


def take_transformer(
    checkpoint: Checkpoint, sizes: TransformerSizes, dtype: torch.dtype | None, progress: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """The weights under our names.

    Args:
        checkpoint: what is taken is gone from there.
        sizes: of the checkpoint.
        dtype: of the result; None keeps it.
        progress: called for every layer.

    Raises:
        ValueError: if a tensor is missing.
    """

    def take(name: str) -> torch.Tensor:
        tensor = checkpoint.take(name)
        return tensor if dtype is None else tensor.to(dtype)

    codes, found = take("tok_embeddings.weight"), {}
    if sizes.kind == "class":
        codes = torch.cat((codes, take(_LABELS)))  # classes get the ids behind the codes
    else:
        found["text_projection.null_features"] = take(_NULL_FEATURES)
        for name in ("fc1.weight", "fc2.weight"):
            found[f"text_projection.{name}"] = take(f"cls_embedding.cap_proj.{name}")
    found["model.language_model.embed_tokens.weight"] = codes
    found["model.language_model.norm.weight"] = take("norm.weight")
    found["lm_head.weight"] = take("output.weight")
    for index in range(sizes.layers):
        theirs, ours = f"layers.{index}.", f"model.language_model.layers.{index}."
        for name, renamed in _PLAIN.items():
            found[ours + renamed] = take(theirs + name)
        head_size = sizes.width // sizes.heads
        keys = sizes.kv_heads * head_size
        query, key, value = take(theirs + "attention.wqkv.weight").split([sizes.width, keys, keys])
        found[ours + "self_attn.q_proj.weight"] = _half_split(query, sizes.heads)
        found[ours + "self_attn.k_proj.weight"] = _half_split(key, sizes.kv_heads)
        found[ours + "self_attn.v_proj.weight"] = value.clone()  # no view: it is written to a file of its own
        progress()
    return found


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * D, width] reordered: published models turn neighbours (2i, 2i + 1), Llama turns (i, i + D / 2)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
