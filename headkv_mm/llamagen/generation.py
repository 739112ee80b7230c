# SPDX-License-Identifier: Apache-2.0
"""The image generation loop: prompt, then one image token per step, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, LogitsProcessorList

from headkv_mm.image_sampling import draw, uniform_streams, warpers
from headkv_mm.llamagen.configuration import LlamaGenConfig  # transformers evaluates the annotation below


class ImageGenerationMixin:
    """Adds `generate` for images to a model with the LlamaGen forward signature."""

    config: LlamaGenConfig
    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        guidance_scale: float | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Generate one image per prompt.

        A setting that is None comes from `generation_config`, then from the model's own generation config.

        Args:
            input_ids: integers [B, P], prompts padded on the left to P = `config.max_prompt_length` columns, such as
                `tokenizer(captions, padding="max_length", return_tensors="pt")` gives.
            attention_mask: [B, P], 0 at padding; by default the columns that hold the padding id are masked.
            generation_config: settings to use in place of the model's.
            guidance_scale: strength of classifier-free guidance; None or 1 means off. With guidance the batch is
                doubled: prompts first, then negative prompts.
            do_sample: draw codes; if False take the best one.
            temperature: divides the scores before drawing.
            top_k: draw from the k best codes only; 0 means all.
            top_p: draw from the smallest set of codes that holds this probability.
            negative_prompt_ids: [1 or B, P] to guide away from; by default the unconditional prompt.
            negative_prompt_attention_mask: its mask, like `attention_mask`.
            past_key_values: an empty cache to fill; by default `_prepare_static_cache` makes one.
            seeds: one integer per image.
            generator: one `torch.Generator` per image, or one for all in turn.
            logits_processor: called with the codes so far [B, i] and the guided scores [B, K], before temperature.
            callback: called with (tokens done, tokens in total) after every token.

        Returns:
            int64 [B, image_height * image_width], codes in raster order.

        Raises:
            ValueError: for prompts of another length, a cache that is not empty, or settings out of range.
        """
        settings = generation_config if generation_config is not None else self.generation_config
        guidance = _first(guidance_scale, settings.guidance_scale, 1.0)
        if guidance < 1:
            raise ValueError(f"guidance_scale must be at least 1 (1 means no guidance), got {guidance}")
        if negative_prompt_ids is not None and guidance == 1:
            raise ValueError("negative_prompt_ids has no effect without guidance: set guidance_scale above 1")
        sampling = bool(_first(do_sample, settings.do_sample, True))
        warp = warpers(
            _first(temperature, settings.temperature, 1.0),
            _first(top_k, settings.top_k, 0),
            _first(top_p, settings.top_p, 1.0),
        )

        attention_mask = self._checked_prompt_mask(input_ids, attention_mask)
        batch, columns = input_ids.shape
        steps = self.config.num_image_tokens
        tokens = torch.empty(batch, steps, dtype=torch.long, device=input_ids.device)
        uniform = uniform_streams(batch, steps, seeds, generator) if sampling else None  # [B, steps]

        rows_ids, rows_mask = input_ids, attention_mask
        if guidance > 1:
            negative_ids, negative_mask = self._negative_prompt(
                input_ids, negative_prompt_ids, negative_prompt_attention_mask
            )
            rows_ids = torch.cat((input_ids, negative_ids))  # [2B, P]
            rows_mask = torch.cat((attention_mask, negative_mask))
        if past_key_values is None:
            past_key_values = self._prepare_static_cache(  # type: ignore[attr-defined]
                cache_implementation=settings.cache_implementation or "static",
                batch_size=rows_ids.shape[0],
                max_cache_len=columns + steps,
                prefill_chunk_size=settings.prefill_chunk_size,
                model_kwargs={},
            )
        elif past_key_values.get_seq_length() != 0:
            raise ValueError("past_key_values must be empty: generate fills it from the prompt on")

        # One column per image token from the start, so that the mask is a view and never copied.
        full_mask = torch.cat((rows_mask, rows_mask.new_ones(rows_mask.shape[0], steps)), dim=1)
        inputs = rows_ids
        for index in range(steps):
            logits = self(  # type: ignore[operator]
                input_ids=inputs,
                attention_mask=full_mask[:, : columns + index],
                past_key_values=past_key_values,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            scores = logits.float()  # [B or 2B, K]
            if guidance > 1:
                conditional, unconditional = scores.chunk(2)
                scores = unconditional + guidance * (conditional - unconditional)
            if logits_processor is not None:
                scores = logits_processor(tokens[:, :index], scores)
            if uniform is None:
                code = scores.argmax(dim=-1)
            else:
                code = draw(warp(tokens[:, :index], scores), uniform[:, index])
            tokens[:, index] = code
            inputs = (code.repeat(2) if guidance > 1 else code)[:, None]
            if callback is not None:
                callback(index + 1, steps)
        return tokens

    def _checked_prompt_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The prompt's mask [B, P], after checking ids and mask."""
        config = self.config
        wanted = config.max_prompt_length
        if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] != wanted:
            raise ValueError(
                f"prompts must have shape [batch, {wanted}], got {tuple(input_ids.shape)}: pad them on the left, "
                'for example with tokenizer(captions, padding="max_length", return_tensors="pt")'
            )
        words = config.get_text_config().vocab_size
        if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < words:
            raise ValueError(f"prompt ids must be in 0..{words - 1}")
        if attention_mask is None:
            if config.pad_token_id is None:
                return torch.ones_like(input_ids)
            attention_mask = (input_ids != config.pad_token_id).long()
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the prompts' shape {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.to(device=input_ids.device, dtype=torch.long)
        if bool((mask[:, -1] != 1).any()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("prompts must be padded on the left: every row of attention_mask is zeros, then ones")
        return mask

    def _negative_prompt(
        self, input_ids: torch.Tensor, ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, P] of what guidance leads away from."""
        if ids is None:
            config = self.config
            words = (config.bos_token_id, config.null_token_id, config.boi_token_id)
            if None in words:
                raise ValueError(
                    "guidance needs negative_prompt_ids: this config has no bos, null and boi ids for the "
                    "unconditional prompt"
                )
            padding = config.max_prompt_length - len(words)
            # Any id will do under the mask if the config names no padding id.
            row = [config.pad_token_id or 0] * padding + list(words)
            ids = input_ids.new_tensor([row])
            mask = input_ids.new_tensor([[0] * padding + [1] * len(words)])
        else:
            mask = self._checked_prompt_mask(ids, mask)
        batch = input_ids.shape[0]
        if ids.shape[0] not in (1, batch):
            raise ValueError(f"expected 1 or {batch} negative prompts, got {ids.shape[0]}")
        return ids.to(input_ids.device).expand(batch, -1), mask.to(input_ids.device).expand(batch, -1)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
