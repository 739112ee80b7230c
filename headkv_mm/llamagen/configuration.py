# SPDX-License-Identifier: Apache-2.0
"""Configuration of the LlamaGen image model."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of an autoregressive image model with a stock Llama backbone.

    Image codes and prompt words share one id space: 0 to `codebook_size` - 1 are image codes, prompt words follow.

    Attributes:
        text_config: `LlamaConfig` of the backbone; `vocab_size` counts image codes and words.
        image_height: image tokens per column.
        image_width: image tokens per row.
        codebook_size: number of image codes.
        max_prompt_length: columns P of every prompt; shorter ones are padded on the left.
        patch_size: pixels per side of an image token if the model carries a pixel codebook, else None.
        learned_positions: add learned embeddings of the prompt slot and of the next image cell to the inputs, beside
            the rotary positions.
        boi_token_id: the last prompt token, after which the image starts.
        null_token_id: stands for the caption in the unconditional prompt `<bos> <null> <boi>`.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "headkv_llamagen"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_height: int = 24
    image_width: int = 24
    codebook_size: int = 16384
    max_prompt_length: int = 120
    patch_size: int | None = None
    learned_positions: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    boi_token_id: int | None = None
    null_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The model registers itself with the Auto classes when it is imported. Whoever loads it through them reads a
        # configuration first; an earlier import could meet transformers while it is still loading Llama.
        importlib.import_module("headkv_mm.llamagen.modeling")
        for name in ("image_height", "image_width", "codebook_size", "max_prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.patch_size is not None and self.patch_size < 1:
            raise ValueError(f"patch_size must be None or at least 1, got {self.patch_size}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: the output head covers the image codes only")
        text = self.get_text_config()
        if text.model_type != "llama":
            raise ValueError(f"text_config must be a LlamaConfig, got model type {text.model_type!r}")
        if text.vocab_size <= self.codebook_size:
            raise ValueError(
                f"text_config.vocab_size ({text.vocab_size}) must exceed codebook_size ({self.codebook_size}): "
                "it counts image codes and prompt words"
            )
        if text.head_dim % 4:
            raise ValueError(f"text_config.head_dim must be a multiple of 4 for two rotary axes, got {text.head_dim}")
        if text.rope_parameters and text.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError("text_config.rope_parameters must be of type 'default': positions lie on a 2-D grid")

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of an image."""
        return self.image_height * self.image_width


__all__ = ["LlamaGenConfig"]
