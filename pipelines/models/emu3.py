# SPDX-License-Identifier: Apache-2.0
"""Adapter for Emu3 (arXiv:2409.18869): stock `generate`, with guidance in a second cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.devices import input_device
from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.pipelines.models.special_tokens import without_special_tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid

_NEWLINE = "<|extra_200|>"
_SPECIAL = ("image_token", "image_start_token", "image_end_token", "fake_token_around_image", "eof_token", "bos_token")
_PUBLISHED = {"guidance_scale": 3.0, "do_sample": True, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}
_BEHIND_THE_IMAGE = 3  # end of frame, of image and of text: the stock decoding takes them off


class Emu3Adapter(ImageModelAdapter):
    """A language model over text and image codes that writes a newline token behind every row.

    Its stock guidance is a second forward pass with a cache of its own; here both caches are compressed.
    """

    architecture = "Emu3"
    needs_processor = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model and its processor.

        Raises:
            ValueError: if there is no processor, or the model knows no image tokens.
        """
        super().__init__(model, tokenizer, processor, image_decoder)
        if processor is None:
            raise ValueError("Emu3 reads prompts through its processor: pass processor=Emu3Processor.from_pretrained()")
        names = model.config.vocabulary_map or {}
        self._codes = torch.tensor(sorted(id for name, id in names.items() if name.startswith("<|visual token")))
        newline = names.get(_NEWLINE)
        if newline is None or not len(self._codes):
            raise ValueError(
                "the vocabulary_map of this Emu3 model's configuration names no image tokens: use a checkpoint that "
                "draws, such as Emu3-Gen"
            )
        self._newline = torch.tensor([newline])
        self._own_grid = self._sized_grid(*processor(text=[""], return_for_image_generation=True)["image_sizes"][0])

    @classmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether `config` is an `Emu3Config`."""
        return getattr(config, "model_type", None) == "emu3"

    @property
    def grid(self) -> ImageGrid:
        """What the processor asks for by default: 90x90 tokens in the published one."""
        return self._own_grid

    def check_grid(self, grid: ImageGrid) -> ImageGrid:
        """Any height and width whose tokens fit into the model's context.

        Raises:
            ValueError: if they do not, or the grid lies elsewhere.
        """
        wanted = self._sized_grid(grid.height, grid.width)
        if grid.start or grid.row_stride not in (grid.width, wanted.row_stride):
            raise ValueError(
                f"Emu3 writes one newline behind each row and nothing before the image: "
                f"ask for ImageGrid({grid.height}, {grid.width})"
            )
        if wanted.tokens >= self._context:
            raise ValueError(
                f"an image of {grid.height}x{grid.width} takes {wanted.tokens} tokens with its newlines, and this "
                f"Emu3 model's context holds {self._context} with the prompt: ask for a smaller image_grid"
            )
        return wanted

    def check_prompt(self, prompt: str) -> str:
        """The prompt as it stands.

        Raises:
            ValueError: if it holds one of the tokens that surround images.
        """
        return without_special_tokens(prompt, self.processor, _SPECIAL)

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the model's generation config, then guidance 3 and top-k 2048 as published."""
        config = self.model.generation_config
        own = {name: value for name in _PUBLISHED if (value := getattr(config, name, None)) is not None}
        return sampling.with_defaults(**{**_PUBLISHED, **own})

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Ids and mask [B, P], padded on the left, and those of the negative prompt [1, P], which may be empty.

        Raises:
            ValueError: if prompt and image are longer than the model's context.
        """
        grid = grid or self.grid
        ids, mask = self._tokens(list(prompts), grid)
        longest = ids.shape[1] + grid.tokens
        if longest > self._context:
            raise ValueError(
                f"prompt and image take {longest} tokens, this Emu3 model's context holds {self._context}: "
                "shorten the prompt or ask for a smaller image_grid"
            )
        negative_ids, negative_mask = self._tokens([negative_prompt or ""], grid)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "negative_prompt_ids": negative_ids,
            "negative_prompt_attention_mask": negative_mask,
        }
        return EncodedPrompts(inputs, mask.sum(dim=1), grid, tuple(prompts))

    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Run the model's stock `generate`; the second cache is that of guidance."""
        from headkv_mm.image_sampling import TokenDrawer
        from headkv_mm.pipelines.models import stock_loop

        grid = prompts.grid
        ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"]
        codes, newline = self._codes.to(ids.device), self._newline.to(ids.device)
        compresses = compression.resolve().compresses
        guidance = None
        if sampling.guidance_scale is not None and sampling.guidance_scale != 1:
            guidance = stock_loop.GuidanceOnCache(
                sampling.guidance_scale,
                self.model,
                prompts.inputs["negative_prompt_ids"].expand(len(ids), -1),
                prompts.inputs["negative_prompt_attention_mask"].expand(len(ids), -1),
                self.new_cache(compression, grid) if compresses else None,
            )
        draw = stock_loop.DrawTokens(
            ids.shape[1],
            lambda step: newline if step % grid.row_stride == grid.width else codes,
            TokenDrawer(
                seeds,
                grid.tokens,
                do_sample=bool(sampling.do_sample),
                temperature=sampling.temperature or 1.0,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p or 1.0,
            ),
            on_token,
        )
        tokens, cache = stock_loop.generate_tokens(
            self.model,
            {"input_ids": ids, "attention_mask": mask},
            steps=grid.tokens,
            processors=[draw] if guidance is None else [guidance, draw],
            cache=self.new_cache(compression, grid) if compresses else None,
        )
        return GeneratedTokens(tokens, [cache] if guidance is None else [cache, guidance.cache])

    def decode(self, tokens: torch.Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the model's own VQ decoder."""
        tokens = tokens.to(input_device(self.model))
        # The stock decoding takes the tokens behind the image off, whatever they are.
        whole = torch.cat([tokens, self._newline.to(tokens.device).expand(len(tokens), _BEHIND_THE_IMAGE)], dim=1)
        pixels = self.model.model.decode_image_tokens(
            image_tokens=whole, height=prompts.grid.height, width=prompts.grid.width
        )  # [B, 3, h, w], normalised
        made = self.processor.postprocess(list(pixels.float().cpu()), return_tensors="PIL.Image.Image")
        return list(made["pixel_values"])

    @property
    def _context(self) -> int:
        """Tokens the model was made for."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    def _sized_grid(self, height: int, width: int) -> ImageGrid:
        from headkv_mm.image_grid import ImageGrid

        return ImageGrid(height, width, row_stride=width + 1)

    def _tokens(self, prompts: list[str], grid: ImageGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask int64 [B, P]: the prompt, and the size of the image that follows."""
        # The processor finds the size from a ratio and an area in pixels.
        encoded = self.processor(
            text=prompts,
            return_for_image_generation=True,
            ratio=f"{grid.width}:{grid.height}",
            image_area=grid.height * grid.width * self.processor.downsample_ratio**2,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        height, width = (int(size) for size in encoded["image_sizes"][0])
        if (height, width) != (grid.height, grid.width):
            raise ValueError(
                f"this Emu3 processor makes {height}x{width} of an image of {grid.height}x{grid.width} tokens"
            )
        return encoded["input_ids"], encoded["attention_mask"]
