# SPDX-License-Identifier: Apache-2.0
"""Adapter for LlamaGen models, the embedded one among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.devices import input_device
from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.pipelines.models.llamagen_prompts import ClassReader, FeatureReader, reader_for

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid

_MODEL_TYPE = "headkv_llamagen"


class LlamaGenAdapter(ImageModelAdapter):
    """Llama blocks on a grid of image tokens (arXiv:2406.06525); guidance doubles the batch.

    What a prompt is depends on the model: see `headkv_mm.pipelines.models.llamagen_prompts`.
    """

    architecture = "LlamaGen"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model and what reads its prompts.

        Raises:
            ValueError: if the model has no decoder, or a tokenizer is missing.
        """
        super().__init__(model, tokenizer, processor, image_decoder)
        if model.config.patch_size is None and model.config.vq_config is None:
            raise ValueError(
                "this LlamaGen model has no image decoder: convert it again with --vq and the tokenizer's checkpoint"
            )
        self._reader = reader_for(model, tokenizer)
        self.tokenizer = self._reader.tokenizer

    @classmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether `config` is a `LlamaGenConfig`."""
        return getattr(config, "model_type", None) == _MODEL_TYPE

    @property
    def grid(self) -> ImageGrid:
        """The grid of the configuration."""
        from headkv_mm.image_grid import ImageGrid

        return ImageGrid(self.model.config.image_height, self.model.config.image_width)

    def check_prompt(self, prompt: str) -> str:
        """The prompt as the model reads it; see `PromptReader`."""
        return self._reader.check(prompt)

    def label_prompts(self, labels: Sequence[int]) -> list[Any]:
        """Prompts "class 207", if the model draws classes."""
        if not isinstance(self._reader, ClassReader):
            raise ValueError("this LlamaGen model draws texts, not classes: give prompts in place of class_labels")
        return list(self._reader.of_labels(labels))

    def feature_prompts(self, features: Any, mask: torch.Tensor | None) -> list[Any]:
        """Prompts of a T5 encoder's features, if the model reads those."""
        if not isinstance(self._reader, FeatureReader):
            raise ValueError("this LlamaGen model reads no text features: leave features out")
        return list(self._reader.of_features(features, mask))

    def bind_text_encoder(self, encoder: Any) -> None:
        """Read texts with a T5 encoder, if the model reads its features."""
        if not isinstance(self._reader, FeatureReader):
            raise ValueError("this LlamaGen model reads prompts without a text encoder: leave text_encoder out")
        self.text_encoder = self._reader.bind_text_encoder(encoder)

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the model's generation config, then no guidance and plain sampling."""
        return sampling.completed(self.model.generation_config)

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """The prompts and their mask [B, P], padded on the left, and the same of the negative prompt."""
        reader = self._reader
        given, mask = reader.read(prompts)
        inputs = {reader.argument: given, "attention_mask": mask}
        if negative_prompt is not None:
            away, away_mask = reader.read([negative_prompt])
            inputs.update({reader.negative_argument: away, "negative_prompt_attention_mask": away_mask})
        return EncodedPrompts(inputs, mask.sum(dim=1), grid or self.grid, tuple(prompts))

    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Run the model's own loop on an explicit cache, so that threads do not meet."""
        cache = self._new_cache(compression, guided=sampling.guidance_scale != 1, prompts=prompts)
        tokens = self.model.generate(
            **prompts.inputs,
            guidance_scale=sampling.guidance_scale,
            do_sample=sampling.do_sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seeds=list(seeds),
            past_key_values=cache,
            callback=None if on_token is None else lambda done, total: on_token(),
        )
        return GeneratedTokens(tokens, [cache])

    def decode(self, tokens: torch.Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the model's decoder."""
        from PIL import Image

        pixels = self.model.decode_image_tokens(tokens.to(input_device(self.model)))
        return [Image.fromarray(picture.numpy()) for picture in pixels.cpu()]

    def _new_cache(self, compression: Compression, *, guided: bool, prompts: EncodedPrompts) -> Any:
        """An empty cache: a compressed one, or the one the model makes for itself.

        The latter is transformers' own, or that of a `headkv_mm.compress` around the call.
        """
        if compression.resolve().compresses:
            from headkv_mm.cache import HeadKVCache

            return HeadKVCache(self.model, compression, image_grid=self.grid)
        rows, columns = prompts.inputs["attention_mask"].shape
        return self.model._prepare_static_cache(
            cache_implementation="static",
            batch_size=2 * rows if guided else rows,
            max_cache_len=columns + self.grid.tokens,
            prefill_chunk_size=None,
            model_kwargs={},
        )
