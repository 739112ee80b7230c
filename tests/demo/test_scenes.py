# SPDX-License-Identifier: Apache-2.0
"""Scenes, the patch dictionary, and the words of prompts."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.demo.patches import (
    patch_dictionary,
    render_scene,
    scene_tokens,
    shape_coverage,
    tokens_to_image,
)
from headkv_mm.demo.scenes import (
    BACKGROUNDS,
    CELL_TOKENS,
    COLOURS,
    PATCH_SIZE,
    PLACES,
    Scene,
    SceneObject,
    caption,
    held_out,
    sample_scene,
    unseen_scenes,
)
from headkv_mm.demo.tokenizer import MAX_PROMPT_LENGTH, WORDS, build_tokenizer, prompt_words


def test_scene_statistics() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(4000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert abs(counts[1] / 4000 - 0.10) < 0.02
    assert abs(counts[2] / 4000 - 0.45) < 0.03
    several = [scene for scene in scenes if len(scene.objects) > 1]
    same = sum(any(item.same_colour for item in scene.objects) for scene in several)
    assert abs(same / len(several) - 0.4) < 0.03
    assert not any(item.same_colour for scene in scenes if len(scene.objects) == 1 for item in scene.objects)


def test_one_caption_in_sixteen_is_held_out() -> None:
    rng = random.Random(1)
    share = sum(held_out(sample_scene(rng)) for _ in range(4000)) / 4000
    assert abs(share - 1 / 16) < 0.012


def test_order_offset_and_free_colour_do_not_change_the_split() -> None:
    for scene in unseen_scenes(50, seed=5):
        moved = tuple(
            SceneObject(item.shape, "purple" if item.same_colour else item.colour, item.place, 1, 1, item.same_colour)
            for item in reversed(scene.objects)
        )
        assert held_out(Scene(moved, scene.background))


def test_unseen_scenes_are_reproducible_and_held_out() -> None:
    scenes = unseen_scenes(20, seed=3)
    assert scenes == unseen_scenes(20, seed=3) != unseen_scenes(20, seed=4)
    assert all(held_out(scene) for scene in scenes)
    with pytest.raises(ValueError, match="at least 0"):
        unseen_scenes(-1)


def test_wrong_scenes_are_refused() -> None:
    ring = SceneObject("ring", "red", "top")
    with pytest.raises(ValueError, match="1 to 3 objects"):
        Scene(())
    with pytest.raises(ValueError, match="two objects are at top"):
        Scene((ring, ring))
    with pytest.raises(ValueError, match="background 'pink'"):
        Scene((ring,), "pink")
    with pytest.raises(ValueError, match="shape 'star'"):
        SceneObject("star", "red", "top")
    with pytest.raises(ValueError, match="offsets must be 0 or 1"):
        SceneObject("ring", "red", "top", 2)
    with pytest.raises(ValueError, match="needs two objects"):
        Scene((SceneObject("ring", "red", "top", same_colour=True),))
    with pytest.raises(ValueError, match="share one colour"):
        Scene(tuple(SceneObject("ring", c, p, same_colour=True) for c, p in (("red", "top"), ("blue", "left"))))
    with pytest.raises(ValueError, match="1 to 3 objects"):
        sample_scene(random.Random(0), objects=4)


def test_caption_text() -> None:
    scene = Scene(
        (
            SceneObject("circle", "red", "top-left"),
            SceneObject("ring", "blue", "bottom", same_colour=True),
            SceneObject("cross", "blue", "right", same_colour=True),
        ),
        "black",
    )
    assert caption(scene) == "red circle top-left, same ring bottom, same cross right on black"


def _draw_directly(scene: Scene) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The scene blended pixel by pixel, without tokens."""
    image = np.tile(np.array(BACKGROUNDS[scene.background], np.float64), (64, 64, 1))
    for item in scene.objects:
        row, column = divmod(PLACES.index(item.place), 3)
        top = PATCH_SIZE * (CELL_TOKENS * row + item.row_offset)
        left = PATCH_SIZE * (CELL_TOKENS * column + item.column_offset)
        alpha = shape_coverage(item.shape)[..., None]
        window = image[top : top + 16, left : left + 16]
        window[:] = alpha * np.array(COLOURS[item.colour]) + (1 - alpha) * window
    return np.round(image).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_the_patch_dictionary_is_lossless(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    np.testing.assert_array_equal(render_scene(scene), _draw_directly(scene))


def test_codes_are_distinct_patches() -> None:
    dictionary = patch_dictionary()
    assert dictionary.size == len(dictionary.codebook) == len(dictionary.codes)
    flat = dictionary.codebook.reshape(dictionary.size, -1)
    assert len(np.unique(flat, axis=0)) == dictionary.size


def test_wrong_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 256 image tokens"):
        tokens_to_image(np.zeros(255, np.int64))
    with pytest.raises(ValueError, match=r"must be in 0\.\."):
        tokens_to_image(np.full(256, patch_dictionary().size))


def test_tokens_and_images_in_batches() -> None:
    scenes = unseen_scenes(6, seed=1)
    tokens = np.stack([scene_tokens(scene) for scene in scenes]).reshape(2, 3, 256)
    images = tokens_to_image(tokens)
    assert images.shape == (2, 3, 64, 64, 3)
    np.testing.assert_array_equal(images[1, 2], render_scene(scenes[5]))


def test_the_tokenizer_agrees_with_the_word_list() -> None:
    tokenizer = build_tokenizer(100)
    ids = {word: 100 + index for index, word in enumerate(WORDS)}
    for scene in unseen_scenes(30, seed=2):
        words = prompt_words(scene)
        assert tokenizer(caption(scene))["input_ids"] == [ids[word] for word in words]
        padded = tokenizer(caption(scene).upper(), padding="max_length")
        padding = MAX_PROMPT_LENGTH - len(words)
        assert padded["input_ids"] == [ids["<pad>"]] * padding + [ids[word] for word in words]
        assert padded["attention_mask"] == [0] * padding + [1] * len(words)
    assert tokenizer("<null>")["input_ids"] == [ids["<bos>"], ids["<null>"], ids["<boi>"]]
    assert tokenizer.pad_token_id == ids["<pad>"]
