# SPDX-License-Identifier: Apache-2.0
"""Configuration of the LlamaGen image model."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

CONDITIONINGS = ("words", "class", "text")


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of an autoregressive image model with a stock Llama backbone.

    Image codes and what a prompt consists of share one id space: 0 to `codebook_size` - 1 are image codes, then come
    the words, or the classes and the null class. Text features have no ids.

    Attributes:
        text_config: `LlamaConfig` of the backbone; `vocab_size` counts image codes, and words or classes.
        image_height: image tokens per column.
        image_width: image tokens per row.
        codebook_size: number of image codes.
        max_prompt_length: columns P of every prompt; shorter ones are padded on the left. 1 for classes.
        conditioning: what a prompt is: "words" of the model's own vocabulary, one "class", or a "text" as features of
            a text encoder.
        num_classes: number of classes; None without.
        feature_size: width of the text encoder's features; None without.
        prompt_rotary: turn queries and keys of the prompt too, prompt position j by (j, j), and start the image at
            (P, P). If False they become zeros and the image starts at (0, 0), as in the published models.
        patch_size: pixels per side of an image token if the model carries a pixel codebook, else None.
        vq_config: `JanusVQVAEConfig` of the decoder if the model carries one, else None.
        learned_positions: add learned embeddings of the prompt slot and of the next image cell to the inputs, beside
            the rotary positions.
        boi_token_id: the last prompt token, after which the image starts.
        null_token_id: stands for the caption in the unconditional prompt `<bos> <null> <boi>`; the null class.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_type = "headkv_llamagen"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vq_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_height: int = 24
    image_width: int = 24
    codebook_size: int = 16384
    max_prompt_length: int = 120
    conditioning: str = "words"
    num_classes: int | None = None
    feature_size: int | None = None
    prompt_rotary: bool = True
    patch_size: int | None = None
    vq_config: dict[str, Any] | PreTrainedConfig | None = None
    learned_positions: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    boi_token_id: int | None = None
    null_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Before super(), which passes some settings on to the parts. Newer transformers would make the parts itself.
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        if isinstance(self.vq_config, dict):
            # Not through AutoConfig: older transformers do not know the name of this part.
            from transformers.models.janus.configuration_janus import JanusVQVAEConfig

            self.vq_config = JanusVQVAEConfig(**{**self.vq_config, "model_type": JanusVQVAEConfig.model_type})
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
        self._check_conditioning(text.vocab_size)
        self._check_decoder()
        if text.head_dim % 4:
            raise ValueError(f"text_config.head_dim must be a multiple of 4 for two rotary axes, got {text.head_dim}")
        if text.rope_parameters and text.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError("text_config.rope_parameters must be of type 'default': positions lie on a 2-D grid")

    def _check_conditioning(self, vocabulary: int) -> None:
        """Check kind, sizes and ids of prompts, and name the null class."""
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}")
        for kind, name in (("class", "num_classes"), ("text", "feature_size")):
            value = getattr(self, name)
            if (value is not None) != (self.conditioning == kind) or (value is not None and value < 1):
                raise ValueError(f"{name} must be at least 1 with conditioning {kind!r} and None else, got {value}")
        if self.conditioning == "words":
            if vocabulary <= self.codebook_size:
                raise ValueError(
                    f"text_config.vocab_size ({vocabulary}) must exceed codebook_size ({self.codebook_size}): "
                    "it counts image codes and prompt words"
                )
            return
        wanted = self.codebook_size + (0 if self.num_classes is None else self.num_classes + 1)
        if vocabulary != wanted:
            raise ValueError(
                f"text_config.vocab_size must be {wanted} (image codes, classes and the null class), got {vocabulary}"
            )
        if self.num_classes is not None:
            self.null_token_id = self.codebook_size + self.num_classes
            if self.max_prompt_length != 1:
                raise ValueError(f"max_prompt_length must be 1 with classes, got {self.max_prompt_length}")

    def _check_decoder(self) -> None:
        """Check that the decoder draws this grid of these codes."""
        if self.vq_config is None:
            return
        if self.patch_size is not None:
            raise ValueError("give either patch_size or vq_config: a model has one decoder")
        decoder: Any = self.vq_config
        if decoder.num_embeddings != self.codebook_size:
            raise ValueError(
                f"vq_config.num_embeddings ({decoder.num_embeddings}) must be codebook_size ({self.codebook_size})"
            )
        if {decoder.num_patches} != {self.image_height, self.image_width}:
            raise ValueError(
                f"vq_config.num_patches ({decoder.num_patches}) must be image_height and image_width "
                f"({self.image_height} and {self.image_width})"
            )

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of an image."""
        return self.image_height * self.image_width


__all__ = ["LlamaGenConfig"]
