# SPDX-License-Identifier: Apache-2.0
"""Adapter for Janus and Janus-Pro."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.pipelines.models.guided_loop import draw_tokens, pad_left, stack_rows
from headkv_mm.pipelines.models.pictures import pictures_of
from headkv_mm.pipelines.models.processing import chat_text, tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid


class JanusAdapter(ImageModelAdapter):
    """A language model with a generation head beside its own (arXiv:2410.13848, arXiv:2501.17811).

    The loop is ours, because transformers' own is broken in some of the versions we serve. It computes what that one
    does, except that a padded prompt counts its positions from its first token and so gives the same image as alone.
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
        self._bos, self._pad = (_special(name, *words) for name in ("bos_token_id", "pad_token_id"))

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

    def check_prompt(self, prompt: str) -> str:
        """The prompt itself, if the model has positions for it and it begins no image.

        Raises:
            ValueError: if it does, or is too long.
        """
        ids = self._ids(prompt)
        if ids.count(self._boi) != 1 or self.model.config.image_token_id in ids:
            raise ValueError("the prompt contains an image token of the model's own: leave it out")
        room = self.model.config.get_text_config(decoder=True).max_position_embeddings - self.grid.tokens
        if len(ids) > room:
            raise ValueError(f"the prompt has {len(ids)} tokens, this model reads at most {room}: shorten it")
        return prompt

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the generation config, then guidance 5 and draws from the whole distribution."""
        return sampling.completed(self.model.generation_config, guidance_scale=5.0)

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Ids and mask [B, P], padded on the left, and those of what guidance leads away from [B, P']."""
        rows = [self._ids(prompt) for prompt in prompts]
        ids, mask = pad_left(rows, self._pad)
        if negative_prompt is not None:
            other = pad_left([self._ids(negative_prompt)] * len(rows), self._pad)
        else:  # the prompt's length without its words, as the models were trained
            other = ids.where((ids == self._bos) | (ids == self._boi), self._pad), mask
        return EncodedPrompts(
            {"input_ids": ids, "attention_mask": mask, "negative_ids": other[0], "negative_mask": other[1]},
            mask.sum(dim=1),
            grid or self.grid,
            tuple(prompts),
        )

    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Prompts and unconditional rows in one batch, on an explicit cache."""
        guidance = 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
        ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"]
        if guidance != 1:
            other = prompts.inputs["negative_ids"], prompts.inputs["negative_mask"]
            ids, mask = stack_rows((ids, mask), other, self._pad)
        cache = self.new_cache(compression, prompts.grid)
        tokens = draw_tokens(
            self.model.get_input_embeddings()(ids),
            mask,
            steps=prompts.grid.tokens,
            guidance_scale=guidance,
            scores=partial(self._scores, cache),
            embed=self.model.prepare_embeddings_for_image_generation,
            choose=sampling.drawer(seeds, prompts.grid.tokens),
            on_token=on_token,
        )
        return GeneratedTokens(tokens, [cache])

    def decode(self, tokens: Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the model's VQ decoder."""
        return pictures_of(tokens.to(self.model.device), self.model.decode_image_tokens)

    def _scores(self, cache: Any, embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Scores [R, codes] of the next image token."""
        output = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        scores: Tensor = self.model.model.generation_head(output.last_hidden_state[:, -1])
        return scores

    def _ids(self, prompt: str) -> list[int]:
        """The prompt as one turn of a conversation if the processor knows how, and the token that begins an image."""
        text, special = chat_text(prompt, self.processor or self.tokenizer, self.tokenizer)
        return [*self.tokenizer(text, add_special_tokens=special)["input_ids"], self._boi]


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
