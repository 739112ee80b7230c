# SPDX-License-Identifier: Apache-2.0
"""Invariants of every registered method, for any sizes, on random keys and queries.

A method is tested by being registered: nothing here names one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm import ImageGrid, methods
from headkv_mm.budgets import image_plan
from headkv_mm.image_compressor import ImageCompressor
from headkv_mm.registry import get_method

from .tiny_llama import tiny_llama

COMPRESSING = [name for name in methods("image") if get_method(name).compresses]
HEAD_DIM = 16


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """A grid, a budget, prompts of different lengths, and head counts."""
    height, width, newline = draw(st.integers(5, 9)), draw(st.integers(3, 6)), draw(st.integers(0, 1))
    grid = ImageGrid(height, width, row_stride=width + newline, start=draw(st.integers(0, 2)))
    budget = draw(st.integers(grid.row_stride + 2, grid.tokens - 1))
    return {
        "grid": grid,
        "budget": budget,
        "prompts": draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)),
        "kv_heads": draw(st.integers(1, 4)),
        "group": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**31)),
        # A low tau makes some heads local on random queries.
        "tau": draw(st.sampled_from([0.05, 0.3, 0.6, 0.9])),
    }


class Driver:
    """Feeds a compressor random tokens. Row r draws from its own generator, so that it is the same alone."""

    def __init__(self, name: str, scene: dict[str, Any], rows: list[int]) -> None:
        method = get_method(name)
        if "tau" in method.options:
            method = method.with_options({"tau": scene["tau"]})
        self.scene, self.rows = scene, rows
        self.generators = [torch.Generator().manual_seed(scene["seed"] + row) for row in rows]
        self.plan = image_plan(scene["budget"], scene["grid"])
        longest = max(scene["prompts"])
        lengths = [scene["prompts"][row] for row in rows]
        visible = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
        keys, values = self.pad(lengths, longest), self.pad(lengths, longest)
        heads = scene["kv_heads"] * scene["group"]
        pieces = method.image.for_model(tiny_llama(1, heads, scene["kv_heads"], HEAD_DIM))
        self.compressor = ImageCompressor(pieces, self.plan, keys, values, visible, lengths)

    def draw(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def pad(self, lengths: list[int], longest: int) -> Tensor:
        """[B, G, T, D] with NaN where there is padding."""
        tensor = torch.full((len(lengths), self.scene["kv_heads"], longest, HEAD_DIM), float("nan"))
        for row, (count, generator) in enumerate(zip(lengths, self.generators, strict=True)):
            tensor[row, :, longest - count :] = torch.randn(
                self.scene["kv_heads"], count, HEAD_DIM, generator=generator
            )
        return tensor

    def step(self) -> Tensor:
        kv_heads = self.scene["kv_heads"]
        query = self.draw(kv_heads * self.scene["group"], 1, HEAD_DIM)
        key, value = self.draw(kv_heads, 1, HEAD_DIM), self.draw(kv_heads, 1, HEAD_DIM)
        return self.compressor.decode(query, key, value, scale=HEAD_DIM**-0.5)


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=15)
@given(scene=scenes())
def test_invariants_hold_after_every_token(name: str, scene: dict[str, Any]) -> None:
    rows = list(range(len(scene["prompts"])))
    driver = Driver(name, scene, rows)
    compressor, plan = driver.compressor, driver.plan
    try:
        first = compressor.pieces.schedule.first(plan)
    except ValueError:
        return  # the image is too small for this schedule; the cache refuses it when it is made
    for token in range(plan.start + plan.tokens):
        output = driver.step()
        assert torch.isfinite(output).all()
        store = compressor.store
        assert (store.length <= store.capacity).all()
        assert int(store.length.max()) <= store.max_length
        evicted_now = token + 1 - plan.start >= first and (token + 1 - plan.start) % plan.row == 0
        for row, heads in enumerate(compressor.store.kept_positions()):
            prompt = scene["prompts"][row]
            condition, seen = prompt + plan.start, prompt + token + 1
            for head, kept in enumerate(heads):
                # Nothing twice, nothing that was never there.
                assert kept.unique().numel() == kept.numel()
                assert int(kept.max()) == seen - 1
                # The condition and one row and two tokens stay.
                protected = torch.cat(
                    [torch.arange(min(condition, seen)), torch.arange(max(0, seen - plan.smallest_window), seen)]
                ).unique()
                assert torch.isin(protected, kept).all()
                if evicted_now:
                    target = int(compressor.allocation.targets[row, head])
                    assert kept.numel() == min(condition + target, seen)
        if compressor.allocation is not None:
            # Exactly the uniform budget, whatever the types: rows of a layer hold budget * heads.
            assert compressor.allocation.targets.sum(-1).tolist() == [plan.budget * scene["kv_heads"]] * len(rows)
            assert compressor.allocation.targets.max() <= compressor.allocation.largest
            assert store.capacity.sum(-1).tolist() == store.row_slots


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=10)
@given(scene=scenes())
def test_rows_do_not_influence_each_other(name: str, scene: dict[str, Any]) -> None:
    rows = list(range(len(scene["prompts"])))
    together = Driver(name, scene, rows)
    try:
        together.compressor.pieces.schedule.first(together.plan)
    except ValueError:
        return
    alone = [Driver(name, scene, [row]) for row in rows]
    for _ in range(together.plan.start + together.plan.tokens):
        output = together.step()
        for row, driver in enumerate(alone):
            assert (driver.step()[0] - output[row]).abs().max() < 1e-5
    for row, driver in enumerate(alone):
        for ours, theirs in zip(
            together.compressor.store.kept_positions()[row], driver.compressor.store.kept_positions()[0], strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["lines", "headkv"])
def test_attention_scores_are_those_of_the_last_row_alone(method: str) -> None:
    """Also at the first eviction, before which several rows were decoded."""
    grid = ImageGrid(6, 4)
    scene = {"grid": grid, "budget": 8, "prompts": [2], "kv_heads": 2, "group": 2, "seed": 5, "tau": 0.9}
    driver = Driver(method, scene, [0])
    options = {"score": "softmax", ("grouping_rows" if method == "headkv" else "first_eviction_rows"): 3}
    resolved = get_method(method).with_options(options).image
    keys = torch.randn(1, 2, 2, HEAD_DIM)
    visible = torch.ones(1, 2, dtype=torch.bool)
    compressor = ImageCompressor(resolved, driver.plan, keys, keys, visible, [2])
    driver.compressor = compressor
    for _ in range(3 * grid.width - 1):
        driver.step()
    store = compressor.store
    for head in range(2):
        region = slice(int(store.start[0, head]), int(store.start[0, head] + store.length[0, head]))
        # Three queries of the last row so far, two query heads each, every softmax sums to one.
        assert store.mass[region].sum() == pytest.approx(3 * 2, abs=1e-4)
