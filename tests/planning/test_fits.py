# SPDX-License-Identifier: Apache-2.0
"""The largest batch for a budget and the largest budget for a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig

from headkv_mm.fits import budget_for, largest_batch
from headkv_mm.image_grid import ImageGrid
from headkv_mm.shapes import get_shape
from headkv_mm.workload import Workload, memory_needed

GIB = 2**30


@pytest.fixture(scope="module")
def images() -> Workload:
    return get_shape("llamagen-xl-384").workload()


@pytest.fixture(scope="module")
def texts() -> Workload:
    return get_shape("qwen3-0.6b").workload(tokens=4000, chunk=512)


@pytest.mark.parametrize("method", ["none", "headkv", "streaming"])
@given(memory=st.integers(2, 80))
@settings(max_examples=20, deadline=None)
def test_one_more_would_not_fit(images: Workload, method: str, memory: int) -> None:
    batch = largest_batch(images, method, memory=memory * GIB)
    assert batch >= 1
    assert memory_needed(images, method, batch=batch).total <= memory * GIB
    assert memory_needed(images, method, batch=batch + 1).total > memory * GIB


@given(memory=st.integers(2, 40), batch=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_the_budget_is_the_largest(images: Workload, memory: int, batch: int) -> None:
    budget = budget_for(images, "lines", memory=memory * GIB, batch=batch)
    if budget is None:
        smallest = images.image_grid.row_stride + 2  # type: ignore[union-attr]
        assert memory_needed(images, "lines", batch=batch, budget=smallest).total > memory * GIB
        return
    assert memory_needed(images, "lines", batch=batch, budget=budget).total <= memory * GIB
    if not isinstance(budget, float):
        assert memory_needed(images, "lines", batch=batch, budget=budget + 1).total > memory * GIB


def test_texts(texts: Workload) -> None:
    full, half, eighth = (
        largest_batch(texts, method, budget=budget, memory=8 * GIB)
        for method, budget in (("none", None), ("snapkv", 1 / 2), ("snapkv", 1 / 8))
    )
    assert full < half < eighth
    budget = budget_for(texts, "snapkv", batch=4 * full, memory=8 * GIB)
    assert isinstance(budget, int)
    assert largest_batch(texts, "snapkv", budget=budget, memory=8 * GIB) >= 4 * full


def test_compression_lets_more_images_fit(images: Workload) -> None:
    full = largest_batch(images, "none", memory=24 * GIB)
    assert 2.5 * full < largest_batch(images, "headkv", budget=1 / 6, memory=24 * GIB) < 6 * full


def test_guidance_takes_two_rows() -> None:
    config = get_shape("llamagen-b-256").config()
    with_, without = (Workload.of(config, guided=guided, condition=1, weights=0) for guided in (True, False))
    assert memory_needed(with_, batch=3).total == memory_needed(without, batch=6).total


def test_a_budget_in_bytes_is_for_all_rows(images: Workload) -> None:
    batch = largest_batch(images, "lines", budget="1GiB", memory=40 * GIB)
    needed = memory_needed(images, "lines", batch=batch, budget="1GiB")
    assert 0.9 * GIB < needed.cache <= GIB
    with pytest.raises(ValueError, match="leaves"):
        memory_needed(images, "lines", batch=batch + 1, budget="1GiB")


def test_a_model_counts_its_own_weights() -> None:
    from headkv_mm.llamagen import LlamaGenForConditionalGeneration

    config = get_shape("llamagen-b-256").config(layers=1, dtype=torch.float32)
    model = LlamaGenForConditionalGeneration(config)
    said: dict[str, Any] = {"memory": GIB, "guided": True, "condition": 1}
    assert largest_batch(model, "headkv", **said) == largest_batch(config, "headkv", **said) > 0


def test_nothing_fits() -> None:
    config = get_shape("llamagen-b-256").config()
    assert largest_batch(config, "headkv", memory=2**20, guided=True, condition=1) == 0
    assert budget_for(config, "headkv", batch=1, memory=2**20, guided=True, condition=1) is None


def test_bad_input(images: Workload) -> None:
    config = get_shape("qwen3-0.6b").config(layers=1)
    with pytest.raises(ValueError, match=r"states no image grid; pass image_grid=.* or tokens=N for texts"):
        largest_batch(config, "headkv", memory=GIB)
    with pytest.raises(ValueError, match="fewer than one row"):
        largest_batch(images, "headkv", budget=3, memory=GIB * 8)
    with pytest.raises(ValueError, match="at least one byte, got 0"):
        largest_batch(images, "headkv", memory=0)
    with pytest.raises(TypeError, match="number of bytes, got '24GiB'"):
        largest_batch(images, "headkv", memory="24GiB")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="says guided already"):
        largest_batch(images, "headkv", memory=GIB, guided=True)
    with pytest.raises(ValueError, match="the stock cache has no budget"):
        budget_for(images, "none", batch=2, memory=GIB)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        budget_for(images, "headkv", batch=0, memory=GIB)
    with pytest.raises(ValueError, match="no class that generates with"):
        Workload.of(CLIPConfig(), image_grid=ImageGrid(4, 4))
