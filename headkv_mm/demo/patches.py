# SPDX-License-Identifier: Apache-2.0
"""An exact dictionary of the 4x4-pixel patches that scenes are made of: a lossless image tokeniser without training."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headkv_mm.demo.scenes import (
    BACKGROUNDS,
    CELL_TOKENS,
    COLOURS,
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    PLACES,
    SHAPE_TOKENS,
    SHAPES,
    Scene,
)

_SHAPE_PIXELS = SHAPE_TOKENS * PATCH_SIZE
_OVERSAMPLING = 8
_COVERAGE_LEVELS = 4  # coverage is rounded to quarters, which keeps the dictionary small

EMPTY = -1  # pattern of a patch without shape
FULL = -2  # pattern of a patch covered by its shape


@functools.cache
def shape_coverage(shape: str) -> npt.NDArray[np.float64]:
    """How much of every pixel a shape covers.

    Args:
        shape: one of `SHAPES`.

    Returns:
        float64 [16, 16] in quarters from 0 to 1.
    """
    from PIL import Image, ImageDraw

    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown: use one of {', '.join(SHAPES)}")
    unit = _OVERSAMPLING
    side = _SHAPE_PIXELS * unit
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    last = side - 1
    if shape == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif shape == "triangle":
        draw.polygon([(last / 2, 0), (last, last), (0, last)], fill=255)
    elif shape == "cross":
        draw.rectangle((4 * unit, 0, 12 * unit - 1, last), fill=255)
        draw.rectangle((0, 4 * unit, last, 12 * unit - 1), fill=255)
    else:
        draw.ellipse((0, 0, last, last), fill=255)
        if shape == "ring":
            draw.ellipse((4.5 * unit, 4.5 * unit, 11.5 * unit - 1, 11.5 * unit - 1), fill=0)
    small = canvas.resize((_SHAPE_PIXELS, _SHAPE_PIXELS), Image.Resampling.BOX)
    coverage = np.asarray(small, dtype=np.float64) / 255
    return np.round(coverage * _COVERAGE_LEVELS) / _COVERAGE_LEVELS


@dataclass(frozen=True)
class PatchDictionary:
    """All patches a scene can contain.

    Attributes:
        codebook: uint8 [K, 4, 4, 3], the pixels of every code.
        factors: K triples (pattern, colour index, background index) that say what the code shows; the pattern is
            `EMPTY`, `FULL` or the number of a partial pattern; colour or background is None where it does not show.
        shape_patterns: for every shape the int64 [4, 4] patterns of its tokens.
    """

    codebook: npt.NDArray[np.uint8]
    factors: tuple[tuple[int, int | None, int | None], ...]
    shape_patterns: dict[str, npt.NDArray[np.int64]]

    @property
    def size(self) -> int:
        """Number of codes K."""
        return len(self.factors)

    @functools.cached_property
    def codes(self) -> dict[tuple[int, int | None, int | None], int]:
        """Code of every factor triple."""
        return {factor: code for code, factor in enumerate(self.factors)}

    @functools.cached_property
    def shape_codes(self) -> dict[tuple[str, str, str], npt.NDArray[np.int64]]:
        """Codes int64 [4, 4] of every (shape, colour, background)."""
        tiles: dict[tuple[str, str, str], npt.NDArray[np.int64]] = {}
        for shape, patterns in self.shape_patterns.items():
            for colour_index, colour in enumerate(COLOURS):
                for background_index, background in enumerate(BACKGROUNDS):
                    tile = np.empty_like(patterns)
                    for position, pattern in np.ndenumerate(patterns):
                        shows_shape, shows_background = pattern != EMPTY, pattern != FULL
                        tile[position] = self.codes[
                            int(pattern),
                            colour_index if shows_shape else None,
                            background_index if shows_background else None,
                        ]
                    tiles[shape, colour, background] = tile
        return tiles


@functools.cache
def patch_dictionary() -> PatchDictionary:
    """Build the dictionary: empty patches, full patches, then partial patterns by colour and background."""
    partial: dict[bytes, int] = {}
    coverages: list[npt.NDArray[np.float64]] = []
    shape_patterns: dict[str, npt.NDArray[np.int64]] = {}
    for shape in SHAPES:
        # [16, 16] -> [4, 4, 4, 4]: token row, token column, pixel row, pixel column
        tiles = shape_coverage(shape).reshape(SHAPE_TOKENS, PATCH_SIZE, SHAPE_TOKENS, PATCH_SIZE).transpose(0, 2, 1, 3)
        patterns = np.empty((SHAPE_TOKENS, SHAPE_TOKENS), np.int64)
        for row in range(SHAPE_TOKENS):
            for column in range(SHAPE_TOKENS):
                tile = np.ascontiguousarray(tiles[row, column])
                if tile.max() == 0:
                    patterns[row, column] = EMPTY
                elif tile.min() == 1:
                    patterns[row, column] = FULL
                else:
                    patterns[row, column] = partial.setdefault(tile.tobytes(), len(partial))
                    if patterns[row, column] == len(coverages):
                        coverages.append(tile)
        shape_patterns[shape] = patterns

    backgrounds = np.array(list(BACKGROUNDS.values()), np.float64)
    colours = np.array(list(COLOURS.values()), np.float64)
    solid = np.ones((PATCH_SIZE, PATCH_SIZE, 1))
    pixels = [solid * value for value in backgrounds] + [solid * value for value in colours]
    factors: list[tuple[int, int | None, int | None]] = [(EMPTY, None, index) for index in range(len(backgrounds))]
    factors += [(FULL, index, None) for index in range(len(colours))]
    for pattern, coverage in enumerate(coverages):
        alpha = coverage[..., None]  # [4, 4, 1]
        for colour_index, colour in enumerate(colours):
            for background_index, background in enumerate(backgrounds):
                pixels.append(alpha * colour + (1 - alpha) * background)
                factors.append((pattern, colour_index, background_index))
    return PatchDictionary(np.round(np.stack(pixels)).astype(np.uint8), tuple(factors), shape_patterns)


def scene_tokens(scene: Scene) -> npt.NDArray[np.int64]:
    """The image tokens of a scene.

    Returns:
        int64 [256] codes in raster order.
    """
    dictionary = patch_dictionary()
    background_index = list(BACKGROUNDS).index(scene.background)
    grid = np.full((GRID_SIZE, GRID_SIZE), dictionary.codes[EMPTY, None, background_index], np.int64)
    for item in scene.objects:
        cell_row, cell_column = divmod(PLACES.index(item.place), 3)
        top = CELL_TOKENS * cell_row + item.row_offset
        left = CELL_TOKENS * cell_column + item.column_offset
        tile = dictionary.shape_codes[item.shape, item.colour, scene.background]
        grid[top : top + SHAPE_TOKENS, left : left + SHAPE_TOKENS] = tile
    return grid.reshape(-1)


def tokens_to_image(tokens: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Draw image tokens.

    Args:
        tokens: integers [..., 256] from 0 to K - 1, raster order.

    Returns:
        uint8 [..., 64, 64, 3] RGB.

    Raises:
        ValueError: for a wrong number of tokens or a code outside the dictionary.
    """
    codes = np.asarray(tokens)
    dictionary = patch_dictionary()
    if codes.ndim == 0 or codes.shape[-1] != GRID_SIZE**2:
        raise ValueError(f"expected {GRID_SIZE**2} image tokens in the last dimension, got shape {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= dictionary.size):
        raise ValueError(f"image tokens must be in 0..{dictionary.size - 1}, got {codes.min()}..{codes.max()}")
    patches = dictionary.codebook[codes]  # [..., 256, 4, 4, 3]
    grid = patches.reshape(*codes.shape[:-1], GRID_SIZE, GRID_SIZE, PATCH_SIZE, PATCH_SIZE, 3)
    image: npt.NDArray[np.uint8] = np.swapaxes(grid, -4, -3)  # token row, pixel row, token column, pixel column
    return np.ascontiguousarray(image).reshape(*codes.shape[:-1], IMAGE_SIZE, IMAGE_SIZE, 3)


def render_scene(scene: Scene) -> npt.NDArray[np.uint8]:
    """Draw a scene as uint8 [64, 64, 3] RGB."""
    return tokens_to_image(scene_tokens(scene))
