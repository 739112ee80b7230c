# SPDX-License-Identifier: Apache-2.0
"""The LlamaGen image model: a stock Llama backbone on a two-dimensional grid of image tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForMultimodalLM, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from headkv_mm.llamagen.configuration import LlamaGenConfig
from headkv_mm.llamagen.generation import ImageGenerationMixin
from headkv_mm.llamagen.positions import AxialRotaryEmbedding, LearnedPositions
from headkv_mm.llamagen.text_features import TextProjection


class PatchDecoder(nn.Module):
    """Turns image tokens into pixels with one fixed patch per code."""

    codebook: torch.Tensor

    def __init__(self, codebook_size: int, patch_size: int) -> None:
        """Allocate an all-black codebook; the pixels come with the weights."""
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codebook_size, patch_size, patch_size, 3, dtype=torch.uint8))

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pixels uint8 [B, height * patch, width * patch, 3] of tokens [B, height * width] in raster order."""
        patch = self.codebook.shape[1]
        grid = self.codebook[tokens].view(-1, height, width, patch, patch, 3)
        return grid.transpose(2, 3).reshape(-1, height * patch, width * patch, 3)


class LlamaGenPreTrainedModel(PreTrainedModel):
    """What all LlamaGen classes share."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    output_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The decoder overflows in float16, and its share of the time is small.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vq_model"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchDecoder) and not getattr(module.codebook, "_is_hf_initialized", False):
            module.codebook.zero_()
        if isinstance(module, TextProjection) and not getattr(module.null_features, "_is_hf_initialized", False):
            module.null_features.normal_(std=self.config.get_text_config().initializer_range)


class LlamaGenModel(LlamaGenPreTrainedModel):
    """Backbone: token embeddings, learned positions, Llama blocks."""

    def __init__(self, config: LlamaGenConfig) -> None:
        """Build the blocks and put the two-axis rotary module in place of Llama's own."""
        super().__init__(config)
        self.language_model = LlamaModel(config.get_text_config())
        self.language_model.rotary_emb = AxialRotaryEmbedding(config)
        self.positions = LearnedPositions(config) if config.learned_positions else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of image codes and prompt words."""
        table: nn.Module = self.language_model.get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of image codes and prompt words."""
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks; arguments as in `LlamaGenForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [B, T, D]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        if self.positions is not None:
            inputs_embeds = inputs_embeds + self.positions(position_ids)
        output: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return output


class LlamaGenForConditionalGeneration(LlamaGenPreTrainedModel, ImageGenerationMixin, GenerationMixin):
    """Text-to-image model that writes an image token by token in raster order.

    Prompts are padded on the left to `config.max_prompt_length` columns P, and `attention_mask` marks the padding. So
    image token i always has sequence position P + i, and position_ids may be left out.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        """Build backbone, head over the image codes and, if the config has them, text projection and decoder."""
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.lm_head = nn.Linear(config.get_text_config().hidden_size, config.codebook_size, bias=False)
        self.patch_decoder = (
            PatchDecoder(config.codebook_size, config.patch_size) if config.patch_size is not None else None
        )
        self.text_projection = TextProjection(config) if config.conditioning == "text" else None
        self.vq_model = _vq_decoder(config.vq_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of image codes and prompt words."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of image codes and prompt words."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head over the image codes."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head over the image codes."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next image code.

        Args:
            input_ids: integers [B, T], prompt words and image codes.
            attention_mask: [B, past + T], 0 at padding; or a prepared 4-D mask.
            position_ids: integers [B or 1, T]; by default the sequence continues where the cache ends.
            past_key_values: keys and values of what came before.
            inputs_embeds: [B, T, D] instead of `input_ids`.
            labels: integers [B, T], the image codes at their own columns and -100 elsewhere; shifted here.
            use_cache: keep keys and values.
            logits_to_keep: compute scores for the last columns only; 0 means all. Not with `labels`.
            **kwargs: for the backbone.

        Returns:
            logits [B, T or logits_to_keep, codebook_size], the loss if there are labels, and the cache.

        Raises:
            ValueError: if `labels` holds ids that are no image codes or comes with `logits_to_keep`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the scores of all columns: leave logits_to_keep at 0")
            if bool((labels >= self.config.codebook_size).any()):
                raise ValueError(
                    f"labels must be image codes below {self.config.codebook_size}: set prompt columns to -100"
                )
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_static_cache(
        self,
        cache_implementation: str,
        batch_size: int,
        max_cache_len: int,
        prefill_chunk_size: int | None,
        model_kwargs: dict[str, Any],
    ) -> Cache:
        """The cache that `generate` fills; a growing one, whatever the name in transformers says."""
        del cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs
        return DynamicCache(config=self.config.get_text_config(decoder=True))

    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Draw images.

        Args:
            image_tokens: integers [B, image_height * image_width], raster order.

        Returns:
            uint8 [B, image_height * s, image_width * s, 3] RGB, where s is `patch_size`, or 2 to the number of times
            that the VQ decoder doubles its grid.

        Raises:
            ValueError: if the model has no decoder, or for a wrong shape or code.
        """
        if self.patch_decoder is None and self.vq_model is None:
            raise ValueError(
                "this model has no pixel codebook and no VQ decoder (config.patch_size and config.vq_config are None): "
                "decode its tokens elsewhere"
            )
        expected = self.config.num_image_tokens
        if image_tokens.dim() != 2 or image_tokens.shape[1] != expected:
            raise ValueError(f"image_tokens must have shape [batch, {expected}], got {tuple(image_tokens.shape)}")
        codes = self.config.codebook_size
        if image_tokens.numel() and not 0 <= int(image_tokens.min()) <= int(image_tokens.max()) < codes:
            raise ValueError(f"image tokens must be in 0..{codes - 1}")
        if self.patch_decoder is not None:
            pixels: torch.Tensor = self.patch_decoder(image_tokens, self.config.image_height, self.config.image_width)
            return pixels
        # One by one: a picture must not depend on its batch, and the largest layers hold hundreds of MB per picture.
        return torch.cat([self._draw(row[None]) for row in image_tokens])

    @torch.no_grad()
    def _draw(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Pixels uint8 [1, height, width, 3] of tokens [1, T] from the VQ decoder, whose pixels lie in [-1, 1]."""
        values = self.vq_model.decode(image_tokens).float()  # type: ignore[union-attr, operator]  # [1, 3, h, w]
        pixels: torch.Tensor = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1)


def _vq_decoder(config: Any) -> nn.Module | None:
    """A `JanusVQVAE` without weights, or None without a configuration."""
    if config is None:
        return None
    from transformers.models.janus.modeling_janus import JanusVQVAE

    decoder: nn.Module = JanusVQVAE._from_config(config)
    return decoder


AutoModelForMultimodalLM.register(LlamaGenConfig, LlamaGenForConditionalGeneration, exist_ok=True)

__all__ = ["LlamaGenForConditionalGeneration", "LlamaGenModel"]
