# SPDX-License-Identifier: Apache-2.0
"""Budgets that heads of a layer or of the model divide, in caches of texts and images: exact, bounded, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm import ImageGrid
from headkv_mm.allocators import HeadType, MassCurves, Pooled, Proportional
from headkv_mm.budgets import image_plan
from headkv_mm.image_compressor import ImageCompressor
from headkv_mm.model_pool import ModelPool
from headkv_mm.pieces import Allocator
from headkv_mm.plan import LayerPlace
from headkv_mm.registry import get_method
from headkv_mm.schedules import AfterGrouping

from .test_text_properties import Driver as TextDriver
from .test_text_properties import check, events
from .test_text_properties import scenes as text_scenes

FORMS: dict[str, Allocator] = {
    "curves": MassCurves(window=8),
    "curves model": MassCurves(window=8, scope="model"),
    "largest loss model": MassCurves(window=8, scope="model", loss="largest", most=2.0, floor=0.5),
    "entropy model": Proportional(window=8, scope="model"),
    "backward": Proportional(window=8, statistic="backward", floor=0.0),
    "keys model": Proportional(window=8, scope="model", statistic="keys"),
    "pointed model": Proportional(window=8, scope="model", statistic="pointed", grouping_queries=21, contrast=8.0),
}
IMAGE_FORMS = {**FORMS, "pooled model": Pooled(scope="model"), "types": HeadType(tau=0.5)}
AGAIN = ["curves, again", "curves model, again", "types, again"]
OVER_LAYERS = [name for name in IMAGE_FORMS if "model" in name]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6)
@given(scene=text_scenes())
def test_texts_keep_exactly_their_budgets(form: str, scene: dict[str, Any]) -> None:
    driver = TextDriver("keydiff", {**scene, "options": {"allocator": FORMS[form]}}, list(range(len(scene["prompts"]))))
    check(driver, None, 0)
    for event in events(scene):
        before = driver.kept()
        driver.run(event)
        check(driver, before, abs(event))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=4)
@given(scene=text_scenes())
def test_rows_of_a_text_are_divided_alone(form: str, scene: dict[str, Any]) -> None:
    scene = {**scene, "options": {"allocator": FORMS[form]}}
    rows = list(range(len(scene["prompts"])))
    together, alone = TextDriver("keydiff", scene, rows), [TextDriver("keydiff", scene, [row]) for row in rows]
    for event in events(scene):
        for driver in (together, *alone):
            driver.run(event)
    for row, driver in enumerate(alone):
        assert [layer[0] for layer in driver.kept()] == [layer[row] for layer in together.kept()]


LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8


class ImageDriver:
    """Feeds the layers of one cache random tokens, layer by layer as a model does."""

    def __init__(self, form: str, grid: ImageGrid, budget: int, prompts: list[int], seed: int, rows: list[int]) -> None:
        form, again, _ = form.partition(", again")
        options = {"allocator": IMAGE_FORMS[form], "grouping_rows": 3, "regroup_rows": 2 if again else None}
        pieces = get_method("headkv").with_options(options).image
        assert pieces is not None
        self.generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        self.prompts = [prompts[row] for row in rows]
        longest = max(prompts)
        visible = torch.arange(longest)[None] >= longest - torch.tensor(self.prompts)[:, None]
        pool = ModelPool()
        # A row draws as many numbers for its padding as alone.
        self.layers = [
            ImageCompressor(
                pieces,
                image_plan(budget, grid, place=LayerPlace(layer, LAYERS)),
                self.draw(longest, layer),
                self.draw(longest, layer),
                visible,
                list(self.prompts),
                pool,
            )
            for layer in range(LAYERS)
        ]

    def draw(self, tokens: int, layer: int, heads: int = KV_HEADS) -> Tensor:
        """Later layers have flatter attention, so that layers differ in what they need."""
        size = 3.0 / (1 + layer)
        return size * torch.stack([torch.randn(heads, tokens, HEAD_DIM, generator=one) for one in self.generators])

    def step(self) -> None:
        for index, layer in enumerate(self.layers):
            query, keys, values = self.draw(1, index, 2 * KV_HEADS), self.draw(1, index), self.draw(1, index)
            assert torch.isfinite(layer.decode(query, keys, values, scale=HEAD_DIM**-0.5)).all()

    def chunk(self, tokens: int) -> None:
        visible = torch.ones(len(self.generators), tokens, dtype=torch.bool)
        for index, layer in enumerate(self.layers):
            query, keys, values = (self.draw(tokens, index, heads) for heads in (2 * KV_HEADS, KV_HEADS, KV_HEADS))
            layer.append(query, keys, values, visible, scale=HEAD_DIM**-0.5)

    def kept(self, row: int) -> list[list[set[int]]]:
        return [[set(head.tolist()) for head in layer.store.kept_positions()[row]] for layer in self.layers]

    def check(self, decoded: int, first: int) -> None:
        """Totals of the model, capacities, and what is protected."""
        plan = self.layers[0].plan
        for layer in self.layers:
            store = layer.store
            assert (store.length <= store.capacity).all()
            assert int(store.length.max()) <= store.max_length
            assert store.capacity.sum(-1).tolist() == store.row_slots
        if decoded < first:
            return
        targets = torch.stack([layer.allocation.targets for layer in self.layers])  # type: ignore[union-attr]
        assert targets.sum((0, 2)).tolist() == [LAYERS * KV_HEADS * plan.budget] * len(self.prompts)
        for row, prompt in enumerate(self.prompts):
            for layer, heads in enumerate(self.kept(row)):
                for head, kept in enumerate(heads):
                    seen, smallest = prompt + decoded, plan.smallest_window
                    assert kept >= set(range(prompt)) | set(range(seen - min(smallest, decoded), seen))
                    if decoded % plan.row == 0:
                        assert len(kept) <= prompt + int(targets[layer, row, head])


@pytest.mark.parametrize("form", [*OVER_LAYERS, *AGAIN])
@settings(max_examples=6)
@given(
    height=st.integers(5, 8),
    width=st.integers(3, 5),
    prompts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_layers_of_an_image_divide_one_budget(
    form: str, height: int, width: int, prompts: list[int], data: st.DataObject
) -> None:
    grid = ImageGrid(height, width)
    budget = data.draw(st.integers(width + 2, height * width - 1))
    seed, rows = data.draw(st.integers(0, 2**31)), list(range(len(prompts)))
    together = ImageDriver(form, grid, budget, prompts, seed, rows)
    alone = [ImageDriver(form, grid, budget, prompts, seed, [row]) for row in rows]
    for decoded in range(1, grid.tokens + 1):
        together.step()
        together.check(decoded, 3 * width)
    for row, driver in enumerate(alone):
        for _ in range(grid.tokens):
            driver.step()
        assert driver.kept(0) == together.kept(row)


# Random keys differ as much in one layer as in another.
@pytest.mark.parametrize("form", [form for form in OVER_LAYERS if form != "keys model"])
def test_layers_get_different_budgets_and_the_same_bytes(form: str) -> None:
    grid = ImageGrid(8, 5)
    driver = ImageDriver(form, grid, 12, [3, 2], 1, [0, 1])
    uniform = ImageDriver("pooled model", grid, 12, [3, 2], 1, [0, 1])
    for _ in range(30):
        driver.step()
        uniform.step()
    totals = [layer.allocation.row_totals for layer in driver.layers]  # type: ignore[union-attr]
    assert len({tuple(total) for total in totals}) > 1
    slots = [sum(sum(layer.store.row_slots) for layer in one.layers) for one in (driver, uniform)]
    assert slots == [LAYERS * KV_HEADS * (3 + 2 + 2 * (12 + 5))] * 2


@pytest.mark.parametrize("tokens", [5, 7, 16])
def test_a_chunk_may_cross_the_first_eviction(tokens: int) -> None:
    driver = ImageDriver("curves model", ImageGrid(8, 5), 12, [3, 2], 1, [0, 1])
    for _ in range(12):
        driver.step()
    driver.chunk(tokens)
    driver.check(12 + tokens, 15)
    for decoded in range(13 + tokens, 41):
        driver.step()
        driver.check(decoded, 15)


@pytest.mark.parametrize("form", AGAIN[:2])
def test_budgets_may_be_divided_anew(form: str) -> None:
    driver = ImageDriver(form, ImageGrid(8, 5), 12, [3, 2], 1, [0, 1])
    changed = []
    for decoded in range(1, 41):
        before = [layer.allocation for layer in driver.layers]
        driver.step()
        driver.check(decoded, 15)
        if any(layer.allocation is not old for layer, old in zip(driver.layers, before, strict=True)):
            changed.append(decoded)
    assert changed == [15, 25, 35]
    assert driver.layers[0].pieces.options["regroup_rows"] == 2


def test_a_layer_that_does_not_wait_says_so() -> None:
    driver = ImageDriver("curves model", ImageGrid(8, 5), 12, [3], 1, [0])
    with pytest.raises(RuntimeError, match="has decided already"):
        driver.layers[0].waiting()


def test_rows_between_divisions_are_checked() -> None:
    with pytest.raises(ValueError, match="regroup_rows must be a whole number of rows, at least 1, got 0"):
        AfterGrouping(regroup_rows=0)
    plan = image_plan(12, ImageGrid(8, 5))
    never, again = AfterGrouping(grouping_rows=3), AfterGrouping(grouping_rows=3, regroup_rows=2)
    assert [again.divides_anew(count - 1, count, plan) for count in (15, 20, 25, 35)] == [False, False, True, True]
    assert again.divides_anew(18, 31, plan)  # a chunk may pass it
    assert not again.divides_anew(5, 24, plan)  # before the first division there is nothing to divide anew
    assert not never.divides_anew(24, 25, plan)
