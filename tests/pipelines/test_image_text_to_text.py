# SPDX-License-Identifier: Apache-2.0
"""Questions about images: the stock pipeline's answers with a full cache, less memory with a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import headkv_mm
from headkv_mm.pipelines import KVImageTextToTextPipeline

from . import tiny_image_models as tiny
from .characters import character_tokenizer

SIDE = 16
ASK = "<image>what is this"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A tiny LLaVA and its processor: an image is 16 tokens."""
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    tokenizer = character_tokenizer({"image_token": "<image>"})
    processor = transformers.LlavaProcessor(
        images(**sizes),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 4,
            "projection_dim": 32,
        },
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval(), processor


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.RandomState(0).randint(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(scope="module")
def pipe(parts: tuple[Any, Any]) -> Any:
    return headkv_mm.pipeline(
        "image-text-to-text", parts[0], processor=parts[1], kv_compression="headkv", kv_budget=12, device="cpu"
    )


def test_the_full_cache_gives_the_stock_answers(parts: tuple[Any, Any], pipe: Any, pictures: list[Any]) -> None:
    assert isinstance(pipe, KVImageTextToTextPipeline)
    stock = transformers.pipeline("image-text-to-text", parts[0], processor=parts[1], device="cpu")
    expected = stock(pictures, text=[ASK, "<image>no"], max_new_tokens=12)
    for settings in ({"kv_compression": None}, {"kv_budget": 1.0}):
        assert pipe(pictures, text=[ASK, "<image>no"], max_new_tokens=12, **settings) == expected
        assert 0 <= pipe.report.nbytes - pipe.report.nbytes_full <= 16  # which columns of the two rows are padding


def test_a_small_budget_holds_less_of_image_and_text(pipe: Any, pictures: list[Any]) -> None:
    full = pipe(pictures[0], text=ASK, max_new_tokens=40, kv_compression=None)
    small = pipe(pictures[0], text=ASK, max_new_tokens=40)
    assert full[0]["generated_text"] != small[0]["generated_text"]
    report = pipe.report
    tokens = 16 + len("what is this")
    assert (report.method, report.budget, report.prompt_tokens, report.tokens) == ("headkv", 12, tokens, 40)
    assert report.nbytes < report.nbytes_full / 1.5
    assert max(length for layer in report.caches[0].lengths for row in layer for length in row) < tokens


def test_a_folder_is_loaded_with_its_processor(parts: tuple[Any, Any], pictures: list[Any], tmp_path: Path) -> None:
    parts[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="processor"):
        headkv_mm.pipeline("image-text-to-text", tmp_path, kv_compression="snapkv")
    parts[1].save_pretrained(tmp_path)
    pipe = headkv_mm.pipeline("image-text-to-text", tmp_path, kv_compression="snapkv", kv_budget=12)
    answer = pipe(pictures[0], text=ASK, max_new_tokens=4)
    assert answer[0]["input_text"] == ASK
    assert pipe.report.method == "snapkv"


def test_a_model_that_also_draws_answers_with_a_text_cache(pictures: list[Any]) -> None:
    model, processor = tiny.janus()
    inputs = processor(images=pictures[:1], text=["<image>what"], return_tensors="pt")
    settings = {"max_new_tokens": 20, "do_sample": False, "generation_mode": "text"}
    model.generation_config.eos_token_id = None
    try:
        stock = model.generate(**inputs, **settings)
    except ValueError as error:
        if "do not match" not in str(error):
            raise
        pytest.skip(f"this transformers cannot answer about images with Janus: {error}")
    with headkv_mm.compress(model, "headkv", budget=1.0):
        assert torch.equal(model.generate(**inputs, **settings), stock)
    with headkv_mm.compress(model, "headkv", budget=12) as session:
        model.generate(**inputs, **settings)
    assert session.caches[0].image_grid is None
    assert max(length for layer in session.report().lengths for row in layer for length in row) < 36
    # A method for texts only is no obstacle if text is all it shall write.
    with headkv_mm.compress(model, "pyramidkv", budget=12, kind="text"):
        model.generate(**inputs, **settings)
    with pytest.raises(ValueError, match="image"), headkv_mm.compress(model, "pyramidkv", budget=12):
        pass


def test_what_cannot_work_is_refused(parts: tuple[Any, Any], pipe: Any, pictures: list[Any]) -> None:
    model, processor = parts
    with pytest.raises(ValueError, match="no embedded model"):
        headkv_mm.pipeline("image-text-to-text", kv_compression="headkv")
    with pytest.raises(ValueError, match="reads no images"):
        KVImageTextToTextPipeline(model=model, processor=processor.tokenizer, kv_compression="headkv")
    with pytest.raises(ValueError, match="lines"):
        pipe(pictures[0], text=ASK, kv_compression="lines")
    with pytest.raises(ValueError, match="unknown method"):
        headkv_mm.pipeline("image-text-to-text", model, processor=processor, kv_compression="nothing")
    blip = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32},
        )
    )
    with pytest.raises(ValueError, match="stock cache"):
        KVImageTextToTextPipeline(model=blip, processor=processor, kv_compression="headkv")
