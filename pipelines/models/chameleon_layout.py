# SPDX-License-Identifier: Apache-2.0
"""Where Chameleon's children put an image: Anole as a plain block, Lumina-mGPT with its size and newlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headkv_mm.image_grid import ImageGrid

BEGIN, END_OF_TURN = "<racm3:break>", "<reserved08706>"
IMAGE_PREFIX = "IMGIMG"  # IMGIMG and the code in letters, A for 0 to J for 9, and Z: IMGIMGBCZ is code 12
_NEWLINE = "<reserved08799>"
_SIZE = "<reserved{:05d}>"  # counts squares of 2 x 2 tokens: 8800 and the count
_PIXELS = 16  # of one token, in the prompts that Lumina-mGPT was trained on


@dataclass(frozen=True)
class ImageVocabulary:
    """The tokens of images in a Chameleon vocabulary.

    Attributes:
        ids: int64 [K], token ids, ascending.
        codes: int64 [K], the code of each in the image codebook.
        begin: id of the token that begins an image.
        end_of_turn: id of the token behind the user's turn.
    """

    ids: Tensor
    codes: Tensor
    begin: int
    end_of_turn: int

    @classmethod
    def of(cls, names: Mapping[str, int]) -> ImageVocabulary:
        """Read a configuration's `vocabulary_map`.

        Raises:
            ValueError: if it names no image tokens.
        """
        pairs = sorted((index, _code(name)) for name, index in names.items() if name.startswith(IMAGE_PREFIX))
        if not pairs or BEGIN not in names or END_OF_TURN not in names:
            raise ValueError(
                f"the vocabulary_map of this Chameleon model's configuration names no image tokens ({IMAGE_PREFIX}..., "
                f"{BEGIN}, {END_OF_TURN}): use a checkpoint that draws, such as Anole or Lumina-mGPT"
            )
        return cls(
            torch.tensor([index for index, _ in pairs]),
            torch.tensor([code for _, code in pairs]),
            names[BEGIN],
            names[END_OF_TURN],
        )

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Codes of token ids, any shape."""
        return self.codes.to(tokens.device)[torch.searchsorted(self.ids.to(tokens.device), tokens.contiguous())]


@dataclass(frozen=True)
class Layout:
    """What surrounds an image.

    Attributes:
        before: text before the prompt.
        header: ids between the prompt and the image's first token.
        unconditional: ids in place of prompt and header, for guidance.
        newline: id behind every row, None where rows follow one another.
        sampling: how the model's authors draw.
    """

    before: str
    header: tuple[int, ...]
    unconditional: tuple[int, ...]
    newline: int | None
    sampling: Mapping[str, Any]


def layout(grid: ImageGrid, vocabulary: ImageVocabulary, names: Mapping[str, int], bos: int) -> Layout:
    """The layout that a grid asks for: Lumina-mGPT's if its rows end with newlines, else Anole's.

    Raises:
        ValueError: if Lumina-mGPT cannot write the size.
    """
    if grid.row_stride == grid.width:
        # Anole's in-batch guidance of text and image falls together for prompts without an image.
        drawn = {"guidance_scale": 3.0, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
        header = (vocabulary.end_of_turn, vocabulary.begin)
        return Layout("", header, (bos, vocabulary.begin), None, drawn)
    sizes = [names.get(_SIZE.format(8800 + side // 2)) for side in (grid.height, grid.width)]
    newline = names.get(_NEWLINE)
    if grid.height % 2 or grid.width % 2 or newline is None or None in sizes:
        raise ValueError(
            f"Lumina-mGPT names the size of an image in squares of 2x2 tokens and has no word for "
            f"{grid.height}x{grid.width}: ask for an even image_grid such as ImageGrid(48, 48, row_stride=49)"
        )
    begin = (vocabulary.begin, *(size for size in sizes if size is not None))
    before = f"Generate an image of {grid.width * _PIXELS}x{grid.height * _PIXELS} according to the following prompt:\n"
    # Its guidance reads nothing but the image itself, from its first token on.
    drawn = {"guidance_scale": 4.0, "do_sample": True, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    return Layout(before, (vocabulary.end_of_turn, *begin), begin, newline, drawn)


def _code(name: str) -> int:
    letters = name.removeprefix(IMAGE_PREFIX)[:-1]
    return int("".join(str(ord(letter) - ord("A")) if "A" <= letter <= "J" else letter for letter in letters))
