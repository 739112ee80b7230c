# SPDX-License-Identifier: Apache-2.0
"""The scene parser: exact on renders, strict on everything else."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.demo.parsing import ParsedObject, _exact_templates, _nearest, parse_image, score, share_all_right
from headkv_mm.demo.patches import render_scene
from headkv_mm.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, SceneObject, sample_scene, unseen_scenes


def _other(names: tuple[str, ...], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def _change(scene: Scene, index: int, **fields: object) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **fields)  # type: ignore[arg-type]
    return Scene(tuple(objects), scene.background)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_renders_are_read_exactly(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    parsed = parse_image(render_scene(scene))
    assert parsed.background == scene.background
    assert parsed.margin_clean
    assert parsed.unreadable == ()
    assert parsed.objects == {item.place: ParsedObject(item.shape, item.colour) for item in scene.objects}
    assert score(scene, render_scene(scene)).all_right


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_every_single_mistake_is_found(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]

    wrong_shape = score(scene, render_scene(_change(scene, index, shape=_other(SHAPES, item.shape))))
    assert not wrong_shape.all_right
    assert not wrong_shape.shape
    assert wrong_shape.colour
    assert wrong_shape.place

    plain = _change(scene, index)
    plain = Scene(tuple(dataclasses.replace(o, same_colour=False) for o in plain.objects), plain.background)
    recoloured = _change(plain, index, colour=_other(tuple(COLOURS), item.colour))
    wrong_colour = score(scene, render_scene(recoloured))
    assert not wrong_colour.all_right
    assert not wrong_colour.colour
    assert wrong_colour.shape

    free = next(place for place in PLACES if place not in {o.place for o in scene.objects})
    moved = score(scene, render_scene(_change(plain, index, place=free)))
    assert not moved.all_right
    assert (moved.extra, moved.missing, moved.place) == (1, 1, False)

    if len(scene.objects) < 3:
        added = Scene((*plain.objects, SceneObject("ring", "red", free)), scene.background)
        extra = score(scene, render_scene(added))
        assert not extra.all_right
        assert (extra.extra, extra.missing) == (1, 0)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_look_up_agrees_with_the_comparison(background: str) -> None:
    exact = _exact_templates(background)
    assert len(exact) == 1 + len(SHAPES) * len(COLOURS) * 4
    for key, label in exact.items():
        cell = np.frombuffer(key, np.uint8).reshape(20, 20, 3)
        assert _nearest(cell, background) == (label, 0)


def test_small_flaws_are_forgiven_and_large_ones_are_not() -> None:
    scene = Scene((SceneObject("square", "red", "top-left"),))
    image = render_scene(scene)
    image[0, :16] = 255  # 16 pixels
    assert score(scene, image).all_right
    image[1, 0] = 255
    result = score(scene, image)
    assert not result.all_right
    assert result.unreadable == 1


def test_wrong_background_and_dirty_margin() -> None:
    scene = unseen_scenes(1, seed=8)[0]
    other = dataclasses.replace(scene, background="black" if scene.background != "black" else "gray")
    assert not score(scene, render_scene(other)).background
    dirty = render_scene(scene).copy()
    dirty[60:] = (220, 40, 40)
    result = score(scene, dirty)
    assert not result.margin_clean
    assert not result.all_right


def test_same_objects_may_have_any_shared_colour() -> None:
    pair = tuple(SceneObject("ring", "red", place, same_colour=True) for place in ("top", "left"))
    scene = Scene(pair)
    green = Scene(tuple(dataclasses.replace(item, colour="green") for item in pair))
    assert score(scene, render_scene(green)).all_right
    mixed = Scene((SceneObject("ring", "red", "top"), SceneObject("ring", "green", "left")))
    result = score(scene, render_scene(mixed))
    assert not result.same_colour
    assert not result.all_right


def test_noise_is_unreadable_and_never_right() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    parsed = parse_image(noise)
    assert parsed.unreadable == PLACES
    assert parsed.objects == {}
    scene = unseen_scenes(1)[0]
    result = score(scene, noise)
    assert not result.all_right
    assert result.unreadable == 9


def test_shifted_images_are_wrong() -> None:
    for scene in unseen_scenes(10, seed=6):
        assert not score(scene, np.roll(render_scene(scene), 20, axis=1)).all_right


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="64x64 pixels, got shape"):
        parse_image(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="8-bit values, got float64"):
        parse_image(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="no scores"):
        share_all_right([])
