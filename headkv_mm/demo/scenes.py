# SPDX-License-Identifier: Apache-2.0
"""The closed world of the embedded text-to-image model: one to three flat shapes in a 3x3 layout.

A scene is a 64x64-pixel image of 16x16 image tokens (4x4 pixels each). The upper left 15x15 tokens are nine cells of
5x5 tokens; a shape covers 4x4 tokens of its cell and may sit at any of the four offsets inside it. The last token row
and column are an empty margin.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "gray": (150, 150, 150),
}
PLACES: tuple[str, ...] = (
    "top-left",
    "top",
    "top-right",
    "left",
    "center",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
SAME = "same"  # the colour word of objects that share one colour which the caption leaves free

PATCH_SIZE = 4  # pixels per side of an image token
GRID_SIZE = 16  # image tokens per side
IMAGE_SIZE = PATCH_SIZE * GRID_SIZE  # pixels per side
CELL_TOKENS = 5  # tokens per side of a cell
SHAPE_TOKENS = 4  # tokens per side of a shape
MAX_OBJECTS = 3

_COUNT_WEIGHTS = (0.10, 0.45, 0.45)  # 1, 2, 3 objects
_SAME_SHARE = 0.4  # of the captions with at least two objects
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`, the colour that is drawn.
        place: one of `PLACES`, the cell.
        row_offset: 0 or 1 tokens from the top of the cell (not in the caption).
        column_offset: 0 or 1 tokens from the left of the cell (not in the caption).
        same_colour: the caption says "same" instead of the colour.

    Raises:
        ValueError: if a field is outside its closed set.
    """

    shape: str
    colour: str
    place: str
    row_offset: int = 0
    column_offset: int = 0
    same_colour: bool = False

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, tuple(COLOURS)),
            ("place", self.place, PLACES),
        ):
            if value not in allowed:
                raise ValueError(f"{field} {value!r} is unknown: use one of {', '.join(allowed)}")
        if self.row_offset not in (0, 1) or self.column_offset not in (0, 1):
            raise ValueError(f"offsets must be 0 or 1 tokens, got {self.row_offset} and {self.column_offset}")

    @property
    def phrase(self) -> str:
        """The object's part of the caption, such as "red circle top-left"."""
        return f"{SAME if self.same_colour else self.colour} {self.shape} {self.place}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three objects in different cells on a plain background.

    Attributes:
        objects: in the order of the caption.
        background: one of `BACKGROUNDS`.

    Raises:
        ValueError: for a wrong number of objects, a shared cell, an unknown background, or "same" objects that are
            fewer than two or differ in colour.
    """

    objects: tuple[SceneObject, ...]
    background: str = "white"

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, got {len(self.objects)}")
        places = [item.place for item in self.objects]
        shared = sorted({place for place in places if places.count(place) > 1})
        if shared:
            raise ValueError(f"two objects are at {shared[0]}: every object needs its own place")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r} is unknown: use one of {', '.join(BACKGROUNDS)}")
        same = [item.colour for item in self.objects if item.same_colour]
        if len(same) == 1:
            raise ValueError("'same' needs two objects that share a colour: say 'same' for each of them")
        if len(set(same)) > 1:
            raise ValueError(f"objects called 'same' must share one colour, got {', '.join(same)}")


def sample_scene(rng: random.Random, objects: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: source of randomness.
        objects: number of objects; drawn with weights .10, .45, .45 for 1, 2, 3 if None.

    Returns:
        A scene whose objects are in random order. 40 % of the scenes with two or more objects have two or all of them
        in one colour that the caption calls "same".

    Raises:
        ValueError: if `objects` is not 1, 2 or 3.
    """
    count = rng.choices((1, 2, 3), _COUNT_WEIGHTS)[0] if objects is None else objects
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, got {count}")
    places = rng.sample(PLACES, count)
    sharing = 0
    if count > 1 and rng.random() < _SAME_SHARE:
        sharing = count if rng.random() < 0.5 else 2
    colour_names = tuple(COLOURS)
    shared_colour = rng.choice(colour_names)
    items = []
    for index, place in enumerate(places):
        same = index < sharing
        colour = shared_colour if same else rng.choice(colour_names)
        items.append(SceneObject(rng.choice(SHAPES), colour, place, rng.randint(0, 1), rng.randint(0, 1), same))
    rng.shuffle(items)
    return Scene(tuple(items), rng.choice(tuple(BACKGROUNDS)))


def caption(scene: Scene) -> str:
    """The canonical caption, such as "red circle top-left, same ring bottom, same cross right on white"."""
    return f"{', '.join(item.phrase for item in scene.objects)} on {scene.background}"


def held_out(scene: Scene) -> bool:
    """Whether the scene is kept out of training.

    A hash of what the caption says, without the order of the objects, decides; so every order of a caption and every
    offset and free colour is on the same side. One caption in 16 is held out.
    """
    content = "; ".join([*sorted(item.phrase for item in scene.objects), scene.background])
    return hashlib.sha256(content.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def unseen_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes that training never sees, the same for the same seed.

    Raises:
        ValueError: if `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if held_out(scene):
            scenes.append(scene)
    return scenes
