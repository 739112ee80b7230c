# SPDX-License-Identifier: Apache-2.0
"""Adapter for Chameleon's children that draw: Anole and Lumina-mGPT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.pipelines.models.chameleon_layout import ImageVocabulary, Layout, layout
from headkv_mm.pipelines.models.guided import GuidedAdapter
from headkv_mm.pipelines.models.image_decoder import image_decoder as decoder_of
from headkv_mm.pipelines.models.pictures import pictures_of
from headkv_mm.pipelines.models.processing import tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.image_sampling import TokenDrawer
    from headkv_mm.pipelines.models.base import EncodedPrompts


class ChameleonAdapter(GuidedAdapter):
    """One vocabulary of words and image codes (arXiv:2405.09818); Anole and Lumina-mGPT draw with it.

    Their papers are arXiv:2407.06135 and arXiv:2408.02657. transformers' class rules image tokens out after its
    language head; here the head is read directly, so nothing is patched. It has no image decoder either, so
    `image_decoder=` must bring one.
    """

    architecture = "Chameleon"
    needs_processor = True
    takes_image_decoder = True
    unused_tensors = ("model.vqmodel.",)  # some carry the image decoder along

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model, its processor (or a tokenizer), and an image decoder.

        Raises:
            ValueError: if one of them is missing, or the model's vocabulary has no image tokens.
            TypeError: for an image decoder that is none.
        """
        super().__init__(model, tokenizer, processor, image_decoder)
        self.tokenizer, self.processor = tokenizer_of(model, tokenizer, processor, self.architecture)
        self._names: dict[str, int] = model.config.vocabulary_map or {}
        self._vocabulary = ImageVocabulary.of(self._names)
        if image_decoder is None:
            raise ValueError(
                "transformers' Chameleon has an image encoder but no decoder: pass image_decoder=, a diffusers VQModel "
                "(or its folder), or a callable of codes int64 [B, h, w] that gives pixels uint8 [B, H, W, 3]"
            )
        self._decode = decoder_of(image_decoder, len(self._vocabulary.ids))
        config, words = model.config, self.tokenizer
        self._bos: int = config.bos_token_id if words.bos_token_id is None else words.bos_token_id
        # Any id will do under the mask if nobody names one for padding.
        self.padding = next((index for index in (config.pad_token_id, words.pad_token_id) if index is not None), 0)

    @classmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether `config` is a `ChameleonConfig`."""
        return getattr(config, "model_type", None) == "chameleon"

    @property
    def grid(self) -> ImageGrid:
        """Anole's block, as large as what the image encoder gives: 32 x 32."""
        from headkv_mm.image_grid import ImageGrid

        encoder = self.model.config.vq_config
        side = encoder.resolution // 2 ** (len(encoder.channel_multiplier) - 1)
        return ImageGrid(side, side)

    def check_grid(self, grid: ImageGrid) -> ImageGrid:
        """Anole's own grid, or any that Lumina-mGPT can name: rows that end with a newline, even sides.

        Raises:
            ValueError: for another one.
        """
        if grid.row_stride == grid.width + 1 and grid.start == 0:
            self._layout(grid)
            return grid
        if grid != self.grid:
            own = self.grid
            raise ValueError(
                f"Anole draws {own.height}x{own.width} tokens; Lumina-mGPT writes newlines, so ask for "
                f"ImageGrid({grid.height}, {grid.width}, row_stride={grid.width + 1}) there, on the command line "
                f"--grid {grid.height}x{grid.width}x{grid.width + 1}"
            )
        return grid

    def check_prompt(self, prompt: str) -> str:
        """The prompt itself, if it holds no image.

        Raises:
            ValueError: if it does.
        """
        ids = self._words(prompt)
        images = {self._vocabulary.begin, getattr(self.model.config, "image_token_id", None)}
        if images & set(ids) or bool(torch.isin(torch.tensor(ids), self._vocabulary.ids).any()):
            raise ValueError("the prompt contains an image token of the model's own: leave it out")
        return prompt

    def defaults(self, grid: ImageGrid) -> Mapping[str, Any]:
        """How Anole's or Lumina-mGPT's authors draw such a grid."""
        return self._layout(grid).sampling

    def prompt_ids(self, prompt: str, grid: ImageGrid) -> list[int]:
        """The user's turn and what begins the image."""
        around = self._layout(grid)
        return [*self._words(around.before + prompt), *around.header]

    def unconditional_ids(self, ids: list[int], grid: ImageGrid) -> list[int]:
        """What begins an image, alone."""
        return list(self._layout(grid).unconditional)

    def chooser(self, draw: TokenDrawer, grid: ImageGrid) -> Callable[[int, Tensor], Tensor]:
        """Draws among the image tokens; newlines are written, not drawn."""
        newline, ids = self._layout(grid).newline, self._vocabulary.ids.to(self.model.device)

        def choose(step: int, scores: Tensor) -> Tensor:
            image_ids = ids.to(scores.device)  # another one only where a model lies on several
            if newline is not None and step % grid.row_stride == grid.width:
                return image_ids.new_full((len(scores),), newline)
            return image_ids[draw(step, scores[:, image_ids])]

        return choose

    def decode(self, tokens: Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the image decoder."""
        grid = prompts.grid
        rows = tokens.view(len(tokens), grid.height, grid.row_stride)[..., : grid.width]  # [B, h, w]
        return pictures_of(self._vocabulary.codes_of(rows), self._decode)

    def _layout(self, grid: ImageGrid) -> Layout:
        return layout(grid, self._vocabulary, self._names, self._bos)

    def _words(self, text: str) -> list[int]:
        """Ids of a text, the token that begins a sequence first, whether the tokenizer writes it or not."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]
