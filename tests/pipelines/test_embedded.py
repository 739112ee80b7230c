# SPDX-License-Identifier: Apache-2.0
"""The example of the README: no model named, none downloaded."""

from __future__ import annotations

import pytest

import headkv_mm
from headkv_mm.demo.captions import scene_from_caption
from headkv_mm.demo.parsing import score
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

PROMPT = "a red circle top left and a blue square bottom right"


@pytest.fixture(scope="module")
def embedded() -> TextToImagePipeline:
    pipe = headkv_mm.pipeline("text-to-image", kv_compression="headkv", kv_budget=1 / 4, device="cpu")
    assert isinstance(pipe, TextToImagePipeline)
    return pipe


@pytest.mark.parametrize("settings", [{}, {"kv_compression": "none"}], ids=["headkv", "full"])
def test_the_embedded_model_draws_what_is_asked(embedded: TextToImagePipeline, settings: dict[str, str]) -> None:
    out = embedded(PROMPT, num_images=4, seed=0, **settings)
    assert out.prompts[0] == "red circle top-left, blue square bottom-right on white"
    assert [image.size for image in out.images] == [(64, 64)] * 4
    right = [score(scene_from_caption(PROMPT), image).all_right for image in out.images]
    assert sum(right) >= 3
    if not settings:
        assert out.report.ratio < 0.4


def test_prompts_outside_the_grammar_are_explained(embedded: TextToImagePipeline) -> None:
    for prompt, message in (
        ("a red zebra top left", "'zebra'.*shapes: circle"),
        ("red circle top, red ring left, red cross right, red square bottom", "1 to 3 objects, got 4"),
        ("red circle", "has no place"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            embedded(prompt)
        assert "\n" not in str(caught.value)
