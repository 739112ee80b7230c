# SPDX-License-Identifier: Apache-2.0
"""A model whose layers lie on two CUDA devices: every layer's cache lies with it, and tokens stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import headkv_mm
from headkv_mm.devices import layer_devices
from headkv_mm.llamagen import LlamaGenForConditionalGeneration

from ..parallel.tensor_parallel_cases import load_models, save_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("headkv", {}),
    ("adakv", {"scope": "model"}),
    ("tova", {}),
    ("pyramidkv", {}),
]


def split(prefix: str, **more: int) -> dict[str, int]:
    """The first layer on one device, the second on the other."""
    places = {"embed_tokens": 0, "layers.0": 0, "rotary_emb": 0, "layers.1": 1, "norm": 1}
    return {"lm_head": 1, **{f"{prefix}.{name}": place for name, place in places.items()}, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_models(path)
    return path


def cache_devices(cache: headkv_mm.HeadKVCache) -> list[int | None]:
    return [None if layer.store is None else layer.store.keys.device.index for layer in cache.compressed_layers]


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[method for method, _ in METHODS])
@torch.no_grad()
def test_text_on_two_devices(folder: Path, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.randint(6, 120, (2, 50), generator=torch.Generator().manual_seed(1)).cuda(0)

    def generate(model: PreTrainedModel) -> tuple[torch.Tensor, headkv_mm.HeadKVCache]:
        with headkv_mm.compress(model, method, budget=0.4, interval=8, **options) as session:
            tokens = model.generate(ids, max_new_tokens=18, do_sample=False)
        session.report()
        return tokens, session.caches[0]

    one, _ = load_models(folder)
    two = LlamaForCausalLM.from_pretrained(folder / "text", device_map=split("model")).eval()
    two.generation_config.eos_token_id = None
    assert layer_devices(two) == {0: torch.device("cuda", 0), 1: torch.device("cuda", 1)}
    expected, _ = generate(one.cuda(0))
    tokens, cache = generate(two)
    assert torch.equal(tokens, expected)
    assert cache_devices(cache) == [0, 1]
    cache.save(tmp_path / "cache.safetensors", two)
    assert cache_devices(headkv_mm.HeadKVCache.load(tmp_path / "cache.safetensors", two)) == [0, 1]


@pytest.mark.parametrize("method", ["headkv", "adakv", "tova"])
def test_an_image_on_two_devices(folder: Path, method: str) -> None:
    prompt = torch.tensor([[30, 30, 31, 35, 36, 32], [31, 37, 38, 39, 35, 32]]).cuda(0)

    def draw(model: PreTrainedModel) -> tuple[torch.Tensor, headkv_mm.HeadKVCache]:
        cache = headkv_mm.HeadKVCache(model, method, budget=0.6)
        return model.generate(prompt, guidance_scale=2.0, do_sample=False, past_key_values=cache), cache

    _, one = load_models(folder)
    places = split("model.language_model", patch_decoder=1)
    two = LlamaGenForConditionalGeneration.from_pretrained(folder / "image", device_map=places).eval()
    expected, _ = draw(one.cuda(0))
    tokens, cache = draw(two)
    assert torch.equal(tokens, expected)
    assert cache_devices(cache) == [0, 1]
