# SPDX-License-Identifier: Apache-2.0
"""Adapter for LlamaGen models, the embedded one among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid

_MODEL_TYPE = "headkv_llamagen"


class LlamaGenAdapter(ImageModelAdapter):
    """Llama blocks on a grid of image tokens (arXiv:2406.06525); guidance doubles the batch.

    A model whose words are those of the scene grammar gets its prompts through that grammar, so that "a red circle
    top left" works; any other tokenizer reads the prompt as it stands.
    """

    architecture = "LlamaGen"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model and find its tokenizer: the one given, the one in its folder, or the scene vocabulary."""
        super().__init__(model, tokenizer, processor, image_decoder)
        if self.tokenizer is None:
            self.tokenizer = _own_tokenizer(model)
        self._speaks_scenes = _speaks_scenes(self.tokenizer)

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
        """The canonical caption, or the prompt itself if it is short enough.

        Raises:
            ValueError: for words outside the grammar, or too many tokens.
        """
        if self._speaks_scenes:
            from headkv_mm.demo.captions import parse_caption

            return str(parse_caption(prompt))
        limit = self.model.config.max_prompt_length
        length = len(self.tokenizer(prompt)["input_ids"])
        if length > limit:
            raise ValueError(f"the prompt has {length} tokens, this model reads at most {limit}: shorten it")
        return prompt

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the model's generation config, then no guidance and plain sampling."""
        return sampling.completed(self.model.generation_config)

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Ids and mask [B, P], padded on the left, and those of the negative prompt [1, P]."""
        ids, mask = self._tokens(list(prompts))
        inputs = {"input_ids": ids, "attention_mask": mask}
        if negative_prompt is not None:
            inputs["negative_prompt_ids"], inputs["negative_prompt_attention_mask"] = self._tokens([negative_prompt])
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
        """RGB pictures from the model's codebook."""
        from PIL import Image

        pixels = self.model.decode_image_tokens(tokens.to(self.model.device))
        return [Image.fromarray(picture.numpy()) for picture in pixels.cpu()]

    def _new_cache(self, compression: Compression, *, guided: bool, prompts: EncodedPrompts) -> Any:
        """An empty cache: a compressed one, or the one the model makes for itself.

        The latter is transformers' own, or that of a `headkv_mm.compress` around the call.
        """
        if compression.resolve().compresses:
            from headkv_mm.cache import HeadKVCache

            return HeadKVCache(self.model, compression, image_grid=self.grid)
        rows, columns = prompts.inputs["input_ids"].shape
        return self.model._prepare_static_cache(
            cache_implementation="static",
            batch_size=2 * rows if guided else rows,
            max_cache_len=columns + self.grid.tokens,
            prefill_chunk_size=None,
            model_kwargs={},
        )

    def _tokens(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask int64 [B, P], padded on the left."""
        encoded = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.model.config.max_prompt_length,
            padding_side="left",
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]


def _speaks_scenes(tokenizer: Any) -> bool:
    """Whether the tokenizer's words are those of the scene grammar."""
    from headkv_mm.demo.tokenizer import WORDS

    return set(tokenizer.get_vocab()) == set(WORDS)


def _own_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer that lies in the model's folder, or the scene vocabulary if its size fits.

    Raises:
        ValueError: if there is neither.
    """
    folder = str(getattr(model, "name_or_path", "") or "")
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    from headkv_mm.demo.tokenizer import WORDS, build_tokenizer

    first_word = model.config.codebook_size
    if model.config.get_text_config().vocab_size - first_word == len(WORDS):
        return build_tokenizer(first_word)
    raise ValueError("this LlamaGen model came without a tokenizer: pass tokenizer=")
