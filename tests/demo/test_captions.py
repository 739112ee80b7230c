# SPDX-License-Identifier: Apache-2.0
"""Captions: canonical ones survive, freer wording is understood, everything else gets a clear error."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.demo.captions import parse_caption, scene_from_caption
from headkv_mm.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, caption, sample_scene


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_canonical_captions_stay_as_they_are(seed: int) -> None:
    text = caption(sample_scene(random.Random(seed)))
    assert parse_caption(text) == text


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_freer_wording_means_the_same(seed: int, style: int) -> None:
    scene = sample_scene(random.Random(seed))
    rng = random.Random(style)
    phrases = []
    for item in scene.objects:
        place = item.place.replace("-", rng.choice("- ")).replace("center", rng.choice(("center", "centre", "middle")))
        corner = " corner" if "-" in item.place and rng.random() < 0.5 else ""
        article = rng.choice(("", "a ", "the "))
        phrases.append(
            f"{article}{item.phrase.split()[0]} {item.shape} {rng.choice(('', 'in the ', 'at '))}{place}{corner}"
        )
    text = rng.choice((", ", " and ", ", and ")).join(phrases)
    ending = rng.choice((f" on {scene.background}", f", on a {scene.background} background."))
    text = (text + ending.replace("gray", rng.choice(("gray", "grey")))).replace("red", rng.choice(("red", "RED")))
    assert parse_caption(text) == caption(scene)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a red circle top left and a blue square bottom right",
            "red circle top-left, blue square bottom-right on white",
        ),
        ("Green ring", None),
        ("purple cross in the middle", "purple cross center on white"),
        ("An orange triangle on the left, on black", "orange triangle left on black"),
        ("top right yellow ring with a grey background", "yellow ring top-right on gray"),
        ("white background, a red cross at the top", "red cross top on white"),
        ("red cross upper center", "red cross top on white"),
        ("same ring top and same cross bottom", "same ring top, same cross bottom on white"),
        ("the same colour ring top, the same colored cross left", "same ring top, same cross left on white"),
    ],
)
def test_examples(text: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="has no place"):
            parse_caption(text)
    else:
        assert parse_caption(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the caption is empty"),
        (" , ", "the caption is empty"),
        ("a pink heart top", "unknown words 'pink', 'heart'"),
        ("red circle top-left\nmauve", "unknown word 'mauve'"),
        ("red circle", "'red circle' has no place"),
        ("circle top", "'circle top' has no colour"),
        ("red top", "'red top' has no shape"),
        ("red circle top blue square left", "put a comma or 'and' between two objects"),
        ("red circle top, blue square top", "two objects are at top"),
        ("red ring top, red ring left, red ring right, red ring bottom", "1 to 3 objects, got 4"),
        ("white circle top", "'white' is a background"),
        ("red circle top on white on black", "names 2 backgrounds"),
        ("on white", "names no object"),
        ("same ring top", "'same' needs two objects"),
        ("red ring left right", "'left right' is no place"),
        ("red ring center center center", "is no place"),
        ("red ring top on", "the word 'on' is out of place"),
        ("red ring colour top", "the word 'colour' is out of place"),
    ],
)
def test_errors_are_one_line_that_states_the_grammar(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_caption(text)
    line = str(caught.value)
    assert "\n" not in line
    assert "COLOUR SHAPE PLACE" in line
    assert "bottom-right" in line


def test_a_caption_must_be_a_string() -> None:
    with pytest.raises(TypeError, match="got int"):
        parse_caption(3)  # type: ignore[arg-type]


_OTHER_WORDS = ("same", "top", "left", "center", "on", "with", "and", ",", "a", "in", "corner", "background")
_SOME_WORDS = (*COLOURS, *SHAPES, *BACKGROUNDS, *_OTHER_WORDS)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(_SOME_WORDS), max_size=12))
def test_any_words_are_read_or_refused(words: list[str]) -> None:
    try:
        canonical = parse_caption(" ".join(words))
    except ValueError:
        return
    assert parse_caption(canonical) == canonical
    assert caption(scene_from_caption(canonical)) == canonical
