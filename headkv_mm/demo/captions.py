# SPDX-License-Identifier: Apache-2.0
"""Reads captions, canonical or in freer wording, and says exactly what is wrong with the others."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from headkv_mm.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SAME, SHAPES, Scene, SceneObject, caption

GRAMMAR = (
    'say "COLOUR SHAPE PLACE, COLOUR SHAPE PLACE on BACKGROUND" with 1 to 3 objects; '
    f"colours: {', '.join(COLOURS)}, {SAME}; shapes: {', '.join(SHAPES)}; places: {', '.join(PLACES)}; "
    f"backgrounds: {', '.join(BACKGROUNDS)}"
)

_SYNONYMS = {
    "grey": "gray",
    "centre": "center",
    "middle": "center",
    "upper": "top",
    "lower": "bottom",
    "color": "colour",
    "colored": "colour",
    "coloured": "colour",
    "canvas": "background",
    "and": ",",
    ";": ",",
}
_DROPPED = frozenset({"a", "an", "the", ".", "!"})
_PLACE_WORDS = frozenset({"top", "bottom", "left", "right", "center"})
_BEFORE_PLACE = frozenset({"at", "in", "on", "to"})
_AFTER_PLACE = frozenset({"corner", "side", "edge"})
_OTHER_WORDS = frozenset({",", "with", "background", "colour"})
_KNOWN = frozenset({*COLOURS, SAME, *SHAPES, *BACKGROUNDS}) | _PLACE_WORDS | _BEFORE_PLACE | _AFTER_PLACE | _OTHER_WORDS
_DEFAULT_BACKGROUND = "white"


def parse_caption(text: str) -> str:
    """Turn a caption into its canonical form.

    Upper case, articles, "and", "in the top left corner", "centre", "grey", "on a white background" and the like are
    understood; a caption without a background gets a white one. The order of the objects stays.

    Args:
        text: such as "A red circle top left and a blue square at the bottom right".

    Returns:
        Such as "red circle top-left, blue square bottom-right on white".

    Raises:
        TypeError: if `text` is not a string.
        ValueError: if the caption is outside the grammar; one line that says why and states the grammar.
    """
    return caption(scene_from_caption(text))


def scene_from_caption(text: str) -> Scene:
    """An example of the scene that a caption asks for.

    What the caption leaves free is filled in: offsets are 0, and objects called "same" get the first colour. `score`
    ignores both.

    Args:
        text: as for `parse_caption`.

    Returns:
        The scene.

    Raises:
        TypeError: if `text` is not a string.
        ValueError: if the caption is outside the grammar.
    """
    if not isinstance(text, str):
        raise TypeError(f"a caption is a string, got {type(text).__name__}")
    try:
        return _read(_words(text))
    except ValueError as error:
        raise ValueError(f"{error}: {GRAMMAR}") from None


@dataclass
class _Phrase:
    """The words found between two commas."""

    colours: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.colours or self.shapes or self.places)


def _words(text: str) -> list[str]:
    """Lower-case words and commas without articles; hyphens count as spaces."""
    found = re.findall(r"[^\W_]+|[^\s\w-]|_", text.lower())
    words = [_SYNONYMS.get(word, word) for word in found if word not in _DROPPED]
    unknown = list(dict.fromkeys(word for word in words if word not in _KNOWN))
    if unknown:
        noun = "word" if len(unknown) == 1 else "words"
        raise ValueError(f"unknown {noun} {', '.join(repr(word) for word in unknown)} in the caption")
    if not set(words) - {","}:
        raise ValueError("the caption is empty")
    return words


def _read(words: list[str]) -> Scene:
    """Sort words into object phrases and the background."""
    phrases = [_Phrase()]
    backgrounds: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        following = words[position + 1] if position + 1 < len(words) else ""
        phrase = phrases[-1]
        position += 1
        if word == ",":
            phrases.append(_Phrase())
        elif word in COLOURS or word == SAME:
            phrase.colours.append(word)
            if word == SAME and following == "colour":
                position += 1
        elif word in SHAPES:
            phrase.shapes.append(word)
        elif word in _PLACE_WORDS:
            if position > 1 and words[position - 2] in _PLACE_WORDS and phrase.places:
                phrase.places[-1] += f" {word}"  # "top" and "left" side by side name one place
            else:
                phrase.places.append(word)
        elif word in ("on", "with") and following in BACKGROUNDS:
            backgrounds.append(following)
            position += 1
            if position < len(words) and words[position] == "background":
                position += 1
        elif word in BACKGROUNDS and following == "background":
            backgrounds.append(word)
            position += 1
        elif word in BACKGROUNDS:
            raise ValueError(f"{word!r} is a background and no colour of an object; for the background say 'on {word}'")
        elif (word in _BEFORE_PLACE and following in _PLACE_WORDS) or (
            word in _AFTER_PLACE and position > 1 and words[position - 2] in _PLACE_WORDS
        ):
            continue
        else:
            raise ValueError(f"the word {word!r} is out of place" + (f" before {following!r}" if following else ""))
    if len(backgrounds) > 1:
        raise ValueError(f"the caption names {len(backgrounds)} backgrounds")
    objects = [_object(phrase) for phrase in phrases if phrase]
    if not objects:
        raise ValueError("the caption names no object")
    return Scene(tuple(objects), backgrounds[0] if backgrounds else _DEFAULT_BACKGROUND)


def _object(phrase: _Phrase) -> SceneObject:
    """The object of a phrase that names exactly one colour, shape and place."""
    said = " ".join([*phrase.colours, *phrase.shapes, *phrase.places])
    for name, found in (("colour", phrase.colours), ("shape", phrase.shapes), ("place", phrase.places)):
        if not found:
            raise ValueError(f"the object {said!r} has no {name}")
        if len(found) > 1:
            raise ValueError(f"the object {said!r} has {len(found)} {name}s; put a comma or 'and' between two objects")
    same = phrase.colours[0] == SAME
    colour = next(iter(COLOURS)) if same else phrase.colours[0]
    return SceneObject(phrase.shapes[0], colour, _place(phrase.places[0]), same_colour=same)


def _place(said: str) -> str:
    """The cell that one or two place words name."""
    words = said.split()
    vertical = [word for word in words if word in ("top", "bottom")]
    horizontal = [word for word in words if word in ("left", "right")]
    if len(vertical) > 1 or len(horizontal) > 1 or words.count("center") > 2 - len(vertical) - len(horizontal):
        raise ValueError(f"{said!r} is no place")
    return "-".join(vertical + horizontal) or "center"
