# SPDX-License-Identifier: Apache-2.0
"""Adapter for Janus and Janus-Pro."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headkv_mm.devices import input_device
from headkv_mm.pipelines.models.guided import GuidedAdapter
from headkv_mm.pipelines.models.pictures import pictures_of
from headkv_mm.pipelines.models.processing import chat_text, tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.pipelines.models.base import EncodedPrompts


class JanusAdapter(GuidedAdapter):
    """A language model with a generation head beside its own (arXiv:2410.13848, arXiv:2501.17811).

    The loop is ours, because transformers' own is broken in some of the versions we serve. It computes what that one
    does; only the positions of a padded prompt count from its first token, as alone. They are relative, so that this
    changes rounding and nothing else.
    """

    architecture = "Janus"
    needs_processor = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model and the processor (or a tokenizer) given, or that in the model's folder.

        Raises:
            ValueError: if there is none, or it has no token that begins an image.
        """
        super().__init__(model, tokenizer, processor, image_decoder)
        self.tokenizer, self.processor = tokenizer_of(model, tokenizer, processor, self.architecture)
        words = self.tokenizer, self.model.generation_config, self.model.config.get_text_config(decoder=True)
        self._boi = _boi_token(self.tokenizer, self.model.generation_config)
        self._bos, self.padding = (_special(name, *words) for name in ("bos_token_id", "pad_token_id"))

    @classmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether `config` is a `JanusConfig`."""
        return getattr(config, "model_type", None) == "janus"

    @property
    def grid(self) -> ImageGrid:
        """The square of image tokens that the configuration states: 24 x 24 for the published models."""
        from headkv_mm.image_grid import ImageGrid

        side = math.isqrt(self.model.config.vision_config.num_image_tokens)
        return ImageGrid(side, side)

    @property
    def decoder(self) -> Any:
        """The language model."""
        return self.model.model.language_model

    def defaults(self, grid: ImageGrid) -> Mapping[str, Any]:
        """Guidance 5, as published."""
        return {"guidance_scale": 5.0}

    def check_prompt(self, prompt: str) -> str:
        """The prompt itself, if it holds no image.

        Raises:
            ValueError: if it does.
        """
        ids = self.prompt_ids(prompt, self.grid)
        if ids.count(self._boi) != 1 or self.model.config.image_token_id in ids:
            raise ValueError("the prompt contains an image token of the model's own: leave it out")
        return prompt

    def prompt_ids(self, prompt: str, grid: ImageGrid) -> list[int]:
        """The prompt as one turn of a conversation if the processor knows how, and the token that begins an image."""
        text, special = chat_text(prompt, self.processor, self.tokenizer)
        return [*self.tokenizer(text, add_special_tokens=special)["input_ids"], self._boi]

    def unconditional_ids(self, ids: list[int], grid: ImageGrid) -> list[int]:
        """As long as the prompt but without its words, as the models were trained; padding that is attended to."""
        return [index if index in (self._bos, self._boi) else self.padding for index in ids]

    def embed(self, tokens: Tensor) -> Tensor:
        """Image tokens have embeddings of their own."""
        found: Tensor = self.model.prepare_embeddings_for_image_generation(tokens)
        return found

    def scores(self, hidden: Tensor) -> Tensor:
        """Image tokens have a head of their own."""
        found: Tensor = self.model.model.generation_head(hidden)
        return found

    def decode(self, tokens: Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the model's VQ decoder."""
        return pictures_of(tokens.to(input_device(self.model)), self.model.decode_image_tokens)


def _boi_token(tokenizer: Any, generation_config: Any) -> int:
    """Id of the token that begins an image.

    Raises:
        ValueError: if neither the generation config nor the tokenizer has one.
    """
    own = (getattr(generation_config, "generation_kwargs", None) or {}).get("boi_token_id")
    found = own if own is not None else getattr(tokenizer, "boi_token_id", None)
    if found is None:
        raise ValueError("this tokenizer has no boi_token (it begins an image): pass the processor of the Janus model")
    return int(found)


def _special(name: str, tokenizer: Any, generation_config: Any, text_config: Any) -> int:
    """A special token's id; the generation config goes first, as in transformers.

    Raises:
        ValueError: if nobody knows it.
    """
    for source in (generation_config, text_config, tokenizer):
        found = getattr(source, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise ValueError(f"this Janus model has no {name}: set it in model.generation_config")
