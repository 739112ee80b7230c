# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models have the published number of parameters, and their caches the planned bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headkv_mm import Compression, HeadKVCache, plan_memory
from headkv_mm.shapes import Shape, get_shape, shapes
from headkv_mm.weight_bytes import count_parameters, empty_model, weight_bytes


@pytest.mark.parametrize("name", list(shapes()))
def test_parameters_are_the_published_ones(name: str) -> None:
    shape = shapes()[name]
    model = empty_model(shape.config())
    assert all(parameter.is_meta for parameter in model.parameters())
    counted = [
        parameter.numel()
        for label, parameter in model.named_parameters()
        if not any(part in label.split(".") for part in shape.apart)
    ]
    assert sum(counted) == pytest.approx(shape.parameters, rel=0.02)
    for part in shape.apart:  # what is left out is really there
        assert sum(counted) < count_parameters(shape.config()), part


def test_weights_of_a_small_one_are_those_of_the_real_model() -> None:
    config = get_shape("llamagen-b-256").config(layers=1, dtype=torch.float32)
    from headkv_mm.llamagen import LlamaGenForConditionalGeneration

    model = LlamaGenForConditionalGeneration(config)
    assert weight_bytes(config) == weight_bytes(model)
    assert weight_bytes(config, torch.bfloat16) == pytest.approx(weight_bytes(model) / 2, rel=1e-4)


def test_a_shape_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no shape 'llamagen-z'; the shapes are: llamagen-b-256, "):
        get_shape("llamagen-z")
    with pytest.raises(ValueError, match="at least 1 layer"):
        get_shape("llamagen-b-256").config(layers=0)


def fill(shape: Shape, cache: HeadKVCache, rows: int, prompt: int, tokens: int) -> None:
    """Random keys, values and queries of the shape's width through every layer: a prompt, then token by token."""
    text = shape.config().get_text_config(decoder=True)
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, length: int) -> torch.Tensor:
        return torch.randn(rows, count, length, dim, generator=generator, dtype=torch.bfloat16)

    with torch.no_grad():
        for length in (prompt, *[1] * tokens):
            query, keys, values = draw(heads, length), draw(kv_heads, length), draw(kv_heads, length)
            for layer in cache.compressed_layers:
                layer.update(keys, values)
                layer.attend(query, None, scale=dim**-0.5, stock=lambda query=query: (query.transpose(1, 2), None))


IMAGES = ["llamagen-b-256", "llamagen-xxl-256", "janus-pro-1b", "janus-pro-7b", "lumina-mgpt-768", "emu3", "glm-image"]


@pytest.mark.parametrize("method", ["headkv", "lines"])
@pytest.mark.parametrize("name", IMAGES)
def test_an_images_cache_is_as_planned(name: str, method: str, decoded: Callable[[Shape], int]) -> None:
    shape = get_shape(name)
    assert shape.grid is not None
    config = shape.config(layers=1)
    rows, compression = 2, Compression(method, budget=1 / 8)
    cache = HeadKVCache(config, compression, image_grid=shape.grid)
    fill(shape, cache, rows, shape.condition, decoded(shape))
    plan = plan_memory(config, compression, rows=rows, condition=shape.condition, image_grid=shape.grid)
    assert cache.nbytes == pytest.approx(plan.nbytes + plan.bookkeeping, rel=2e-3)
    assert cache.nbytes <= plan.nbytes + plan.bookkeeping
    assert cache.nbytes_peak <= plan.nbytes_peak
    assert cache.nbytes_peak == pytest.approx(plan.nbytes_peak, rel=0.01)


@pytest.fixture
def decoded() -> Callable[[Shape], int]:
    """Tokens after the prompt: enough for every layer to have evicted, and to be full again before the next time."""

    def tokens(shape: Shape) -> int:
        assert shape.grid is not None
        rows = max(6, -(-shape.grid.height // 8) + 2)
        return shape.grid.start + rows * shape.grid.row_stride - 1

    return tokens


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-0.6b"])
def test_a_texts_cache_is_as_planned(name: str) -> None:
    shape, tokens = get_shape(name), 300
    config = shape.config(layers=2)
    cache = HeadKVCache(config, "snapkv", budget=64)
    fill(shape, cache, 2, 200, tokens - 200)
    plan = plan_memory(config, "snapkv", budget=64, rows=2, tokens=tokens)
    held = plan.nbytes + plan.bookkeeping
    # At most one interval's queries are waiting for the next decision.
    assert 0.9 * held <= cache.nbytes <= held
    stock: Any = HeadKVCache(config, "none")
    fill(shape, stock, 2, 200, tokens - 200)
    assert stock.nbytes == plan.nbytes_full
