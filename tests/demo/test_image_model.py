# SPDX-License-Identifier: Apache-2.0
"""The embedded text-to-image model draws what unseen captions ask for."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoTokenizer

from headkv_mm.demo import image_model_path
from headkv_mm.demo.image_training import SamplingSettings, generate_and_score
from headkv_mm.demo.parsing import score
from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.llamagen import LlamaGenForConditionalGeneration, register


@pytest.fixture(scope="module")
def model() -> LlamaGenForConditionalGeneration:
    register()
    loaded: LlamaGenForConditionalGeneration = AutoModelForMultimodalLM.from_pretrained(image_model_path())
    return loaded


def test_the_folder_is_small_and_complete() -> None:
    folder = image_model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8_000_000
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names


def test_default_settings_on_unseen_captions(model: LlamaGenForConditionalGeneration) -> None:
    tokenizer = AutoTokenizer.from_pretrained(image_model_path())
    scenes = unseen_scenes(16, seed=4)
    prompts = tokenizer([caption(scene) for scene in scenes], padding="max_length", return_tensors="pt")
    tokens = model.generate(prompts["input_ids"], prompts["attention_mask"], seeds=list(range(16)))
    images = model.decode_image_tokens(tokens).numpy()
    right = sum(score(scene, image).all_right for scene, image in zip(scenes, images, strict=True))
    assert right >= 14


def test_guidance_on_unseen_captions(model: LlamaGenForConditionalGeneration) -> None:
    _, scores = generate_and_score(model, unseen_scenes(8, seed=5), SamplingSettings(0.7, 50, 2.0))
    assert sum(item.all_right for item in scores) >= 6


def test_images_depend_on_the_seed_and_on_nothing_else(model: LlamaGenForConditionalGeneration) -> None:
    tokenizer = AutoTokenizer.from_pretrained(image_model_path())
    text = "same ring top-left, same cross right on gray"
    prompts = tokenizer([text] * 3, padding="max_length", return_tensors="pt")
    tokens = model.generate(prompts["input_ids"], prompts["attention_mask"], seeds=[0, 1, 0])
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
