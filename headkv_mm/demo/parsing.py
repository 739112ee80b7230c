# SPDX-License-Identifier: Apache-2.0
"""Reads a scene image back and scores it against what was asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headkv_mm.demo.patches import shape_coverage
from headkv_mm.demo.scenes import BACKGROUNDS, CELL_TOKENS, COLOURS, IMAGE_SIZE, PATCH_SIZE, PLACES, SHAPES, Scene

_CELL_PIXELS = CELL_TOKENS * PATCH_SIZE
_PIXEL_TOLERANCE = 40  # largest channel difference that still counts as the same pixel
_WRONG_PIXELS = 16  # of the 400 pixels of a cell that may differ from the template
_MARGIN_WRONG_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class ParsedObject:
    """What one cell shows: a shape and its colour."""

    shape: str
    colour: str


@dataclass(frozen=True, slots=True)
class ParsedScene:
    """What an image shows.

    Attributes:
        background: name of the background that is nearest to the margin's median colour.
        margin_clean: the margin shows nothing but background.
        objects: readable objects by place.
        unreadable: places that are neither empty nor a known shape.
    """

    background: str
    margin_clean: bool
    objects: dict[str, ParsedObject]
    unreadable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SceneScore:
    """How well an image shows a scene.

    Attributes:
        background: the background is right.
        place: every cell that should be empty is empty, and no other cell is.
        shape: every object has the right shape at its place.
        colour: every named colour is right, and the objects called "same" share one colour.
        same_colour: the objects called "same" share one readable colour (True if there are none).
        extra: number of cells that show something nobody asked for.
        missing: number of asked-for cells that are empty.
        unreadable: number of cells that show no known shape.
        margin_clean: the margin shows nothing but background.
    """

    background: bool
    place: bool
    shape: bool
    colour: bool
    same_colour: bool
    extra: int
    missing: int
    unreadable: int
    margin_clean: bool

    @property
    def all_right(self) -> bool:
        """Everything is right."""
        return self.background and self.place and self.shape and self.colour and self.margin_clean


@functools.cache
def _templates(background: str) -> tuple[list[ParsedObject | None], npt.NDArray[np.float32]]:
    """Labels and pixels float32 [n, 20, 20, 3] of every content of a cell: empty, or a shape at one of four offsets."""
    empty = np.tile(np.array(BACKGROUNDS[background], np.float32), (_CELL_PIXELS, _CELL_PIXELS, 1))
    labels: list[ParsedObject | None] = [None]
    pixels = [empty]
    for shape in SHAPES:
        coverage = shape_coverage(shape).astype(np.float32)
        side = len(coverage)
        for top in (0, PATCH_SIZE):
            for left in (0, PATCH_SIZE):
                alpha = np.zeros((_CELL_PIXELS, _CELL_PIXELS, 1), np.float32)
                alpha[top : top + side, left : left + side, 0] = coverage
                for colour, value in COLOURS.items():
                    labels.append(ParsedObject(shape, colour))
                    pixels.append(alpha * np.array(value, np.float32) + (1 - alpha) * empty)
    return labels, np.stack(pixels)


@functools.cache
def _exact_templates(background: str) -> dict[bytes, ParsedObject | None]:
    """Labels by the exact bytes of a cell: most cells are flawless, and a look-up is quick."""
    labels, pixels = _templates(background)
    return {cell.tobytes(): label for cell, label in zip(np.round(pixels).astype(np.uint8), labels, strict=True)}


def _nearest(cell: npt.NDArray[np.uint8], background: str) -> tuple[ParsedObject | None, int]:
    """The label of the template with the fewest wrong pixels, and that number; `cell` is [20, 20, 3]."""
    labels, templates = _templates(background)
    wrong = (np.abs(cell.astype(np.float32) - templates).max(axis=-1) > _PIXEL_TOLERANCE).sum(axis=(1, 2))  # [n]
    best = int(wrong.argmin())
    return labels[best], int(wrong[best])


def parse_image(image: npt.ArrayLike) -> ParsedScene:
    """Read a scene image.

    Args:
        image: uint8 [64, 64, 3] RGB (a `PIL.Image` in RGB mode works too).

    Returns:
        What is in the image; nothing is guessed: a cell that matches no template is unreadable.

    Raises:
        ValueError: if the image has another shape.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected an image of 8-bit values, got {pixels.dtype}")
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"expected an RGB image of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, got shape {pixels.shape}")
    first_margin = 3 * _CELL_PIXELS
    margin = np.concatenate([pixels[first_margin:].reshape(-1, 3), pixels[:first_margin, first_margin:].reshape(-1, 3)])
    margin = margin.astype(np.float32)
    names = list(BACKGROUNDS)
    values = np.array(list(BACKGROUNDS.values()), np.float32)  # [3, 3]
    nearest = int(np.abs(np.median(margin, axis=0) - values).sum(axis=1).argmin())
    margin_wrong = float((np.abs(margin - values[nearest]).max(axis=-1) > _PIXEL_TOLERANCE).mean())

    exact = _exact_templates(names[nearest])
    objects: dict[str, ParsedObject] = {}
    unreadable: list[str] = []
    for index, place in enumerate(PLACES):
        row, column = divmod(index, 3)
        top, left = row * _CELL_PIXELS, column * _CELL_PIXELS
        cell = pixels[top : top + _CELL_PIXELS, left : left + _CELL_PIXELS]
        key = cell.tobytes()
        label, wrong = (exact[key], 0) if key in exact else _nearest(cell, names[nearest])
        if wrong > _WRONG_PIXELS:
            unreadable.append(place)
        elif label is not None:
            objects[place] = label
    return ParsedScene(names[nearest], margin_wrong < _MARGIN_WRONG_SHARE, objects, tuple(unreadable))


def score(scene: Scene, image: npt.ArrayLike) -> SceneScore:
    """Compare an image with the scene its caption describes.

    The offset of an object inside its cell and the colour of "same" objects are free; those must share one colour.

    Args:
        scene: what was asked for.
        image: uint8 [64, 64, 3] RGB.

    Returns:
        The score, field by field.

    Raises:
        ValueError: if the image has another shape.
    """
    parsed = parse_image(image)
    wanted = {item.place: item for item in scene.objects}
    occupied = set(parsed.objects) | set(parsed.unreadable)
    extra = len(occupied - set(wanted))
    missing = len(set(wanted) - occupied)
    seen = {place: parsed.objects.get(place) for place in wanted}
    shared = {found.colour if found else None for place, found in seen.items() if wanted[place].same_colour}
    same_colour = not shared or (len(shared) == 1 and None not in shared)
    named = all(
        found is not None and found.colour == wanted[place].colour
        for place, found in seen.items()
        if not wanted[place].same_colour
    )
    return SceneScore(
        background=parsed.background == scene.background,
        place=extra == 0 and missing == 0,
        shape=all(found is not None and found.shape == wanted[place].shape for place, found in seen.items()),
        colour=named and same_colour,
        same_colour=same_colour,
        extra=extra,
        missing=missing,
        unreadable=len(parsed.unreadable),
        margin_clean=parsed.margin_clean,
    )


def share_all_right(scores: Iterable[SceneScore]) -> float:
    """Share of scores with everything right.

    Raises:
        ValueError: if there are no scores.
    """
    results = [item.all_right for item in scores]
    if not results:
        raise ValueError("no scores to average: pass at least one")
    return sum(results) / len(results)
