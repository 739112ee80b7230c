# SPDX-License-Identifier: Apache-2.0
"""The image generation loop: prompt, then one image token per step, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, LogitsProcessorList

from headkv_mm.image_sampling import TokenDrawer
from headkv_mm.llamagen.configuration import LlamaGenConfig  # transformers evaluates the annotation below
from headkv_mm.llamagen.prompts import PromptRows, class_ids, feature_rows, id_rows
from headkv_mm.llamagen.text_features import TextProjection


class ImageGenerationMixin:
    """Adds `generate` for images to a model with the LlamaGen forward signature."""

    config: LlamaGenConfig
    generation_config: GenerationConfig
    text_projection: TextProjection | None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        guidance_scale: float | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_text_features: torch.Tensor | None = None,
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
            class_labels: [B] in place of `input_ids`, for models with conditioning "class".
            text_features: [B, P, feature_size] in place of `input_ids`, for models with conditioning "text"; padded on
                the left, `attention_mask` says where.
            generation_config: settings to use in place of the model's.
            guidance_scale: strength of classifier-free guidance; None or 1 means off. With guidance the batch is
                doubled: prompts first, then negative prompts.
            do_sample: draw codes; if False take the best one.
            temperature: divides the scores before drawing.
            top_k: draw from the k best codes only; 0 means all.
            top_p: draw from the smallest set of codes that holds this probability.
            negative_prompt_ids: [1 or B, P] to guide away from; by default the unconditional prompt.
            negative_text_features: [1 or B, P, feature_size] to guide away from; by default the learned null features
                under the prompts' mask.
            negative_prompt_attention_mask: mask of what guidance leads away from, like `attention_mask`.
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
        rows = self._prompt_rows(
            input_ids,
            class_labels,
            text_features,
            attention_mask,
            negative_prompt_ids,
            negative_text_features,
            negative_prompt_attention_mask,
            guided=guidance > 1,
        )
        batch, columns, steps = rows.images, rows.mask.shape[1], self.config.num_image_tokens
        tokens = torch.empty(batch, steps, dtype=torch.long, device=rows.device)
        draw = TokenDrawer(
            seeds,
            steps,
            images=batch,
            generator=generator,
            do_sample=bool(_first(do_sample, settings.do_sample, True)),
            temperature=_first(temperature, settings.temperature, 1.0),
            top_k=_first(top_k, settings.top_k, 0),
            top_p=_first(top_p, settings.top_p, 1.0),
        )
        if past_key_values is None:
            past_key_values = self._prepare_static_cache(  # type: ignore[attr-defined]
                cache_implementation=settings.cache_implementation or "static",
                batch_size=len(rows.mask),
                max_cache_len=columns + steps,
                prefill_chunk_size=settings.prefill_chunk_size,
                model_kwargs={},
            )
        elif past_key_values.get_seq_length() != 0:
            raise ValueError("past_key_values must be empty: generate fills it from the prompt on")

        # One column per image token from the start, so that the mask is a view and never copied.
        full_mask = torch.cat((rows.mask, rows.mask.new_ones(len(rows.mask), steps)), dim=1)
        inputs = rows.inputs
        for index in range(steps):
            logits = self(  # type: ignore[operator]
                **inputs,
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
            code = draw(index, scores)
            tokens[:, index] = code
            inputs = {"input_ids": (code.repeat(2) if guidance > 1 else code)[:, None]}
            if callback is not None:
                callback(index + 1, steps)
        return tokens

    def _prompt_rows(
        self,
        ids: torch.Tensor | None,
        labels: Sequence[int] | torch.Tensor | None,
        features: torch.Tensor | None,
        mask: torch.Tensor | None,
        negative_ids: torch.Tensor | None,
        negative_features: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
        *,
        guided: bool,
    ) -> PromptRows:
        """The rows of the one kind of prompts that was given."""
        if sum(given is not None for given in (ids, labels, features)) != 1:
            raise ValueError("pass exactly one of input_ids, class_labels and text_features")
        if not guided and (negative_ids is not None or negative_features is not None):
            name = "negative_prompt_ids" if negative_ids is not None else "negative_text_features"
            raise ValueError(f"{name} has no effect without guidance: set guidance_scale above 1")
        if features is not None:
            if self.text_projection is None:
                raise ValueError(
                    f"text_features are for models with conditioning 'text', this one has {self.config.conditioning!r}"
                )
            return feature_rows(
                self.config, self.text_projection, features, mask, negative_features, negative_mask, guided=guided
            )
        if self.text_projection is not None:
            raise ValueError("this model reads the features of a text encoder: pass text_features")
        if labels is not None:
            ids = class_ids(self.config, labels).to(self.device)  # type: ignore[attr-defined]
        assert ids is not None  # counted above
        return id_rows(self.config, ids, mask, negative_ids, negative_mask, guided=guided)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
