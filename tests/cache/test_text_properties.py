# SPDX-License-Identifier: Apache-2.0
"""Invariants of every method for texts, for any sizes, on random keys and queries.

A method is tested by being registered. Several layers are driven side by side, since some methods divide a budget among
them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm import methods
from headkv_mm.allocators import RiskGate
from headkv_mm.asked import Asked
from headkv_mm.model_pool import ModelPool
from headkv_mm.plan import LayerPlace
from headkv_mm.registry import get_method
from headkv_mm.text_compressor import TextCompressor
from headkv_mm.text_plan import text_plan

from .tiny_llama import tiny_llama

COMPRESSING = [name for name in methods("text") if get_method(name).compresses] + ["adakv over layers"]
HEAD_DIM, LAYERS = 8, 3
SCALE = HEAD_DIM**-0.5

Kept = list[list[list[set[int]]]]
"""Positions by layer, row and head."""


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """Prompts, a budget, head counts, and what comes after: numbers of decoded tokens, and chunks (negative)."""
    return {
        "budget": draw(st.one_of(st.integers(8, 40), st.sampled_from([0.1, 0.3, 0.6]))),
        "interval": draw(st.sampled_from([None, 1, 3, 7])),
        "prompts": draw(st.lists(st.integers(1, 60), min_size=1, max_size=3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**31)),
        "after": draw(st.lists(st.sampled_from([1, 5, 18, -2, -9, -30]), min_size=1, max_size=3)),
        # A low tau makes some heads local on random queries.
        "tau": draw(st.sampled_from([0.05, 0.3, 0.6, 0.9])),
    }


class Driver:
    """Feeds compressors of several layers random tokens. Row r draws from its own generator, as it would alone."""

    def __init__(self, name: str, scene: dict[str, Any], rows: list[int]) -> None:
        self.scene, self.kv_heads = scene, scene["kv_heads"]
        self.heads = self.kv_heads * scene["group"]
        name, _, over_layers = name.partition(" ")
        method = get_method(name).with_options({"interval": scene["interval"]})
        if over_layers:
            method = method.with_options({"scope": "model"})
        if "tau" in method.options:
            method = method.with_options({"tau": scene["tau"]})
        if "scores" in method.options:
            scores = torch.rand(LAYERS, self.kv_heads, generator=torch.Generator().manual_seed(scene["seed"]))
            method = method.with_options({"scores": scores.square().tolist()})
        if "head_scores" in method.options:
            generator = torch.Generator().manual_seed(scene["seed"])
            scores = torch.rand(LAYERS, self.heads, generator=generator).square().tolist()
            errors = torch.rand(LAYERS, generator=generator).tolist()
            method = method.with_options({"head_scores": scores, "layer_errors": errors, "least": 5})
        if "head_weights" in method.options:
            weights = 0.8 + 0.7 * torch.rand(
                LAYERS, self.kv_heads, generator=torch.Generator().manual_seed(scene["seed"])
            )
            gate = [[[0.0, 0.3 * layer], [0.0, 1.0]] for layer in range(LAYERS)]
            method = method.with_options({"head_weights": weights.tolist(), "gate": gate, "entropy_edges": [0.9]})
        pieces = method.with_options(scene.get("options", {})).text
        self.pieces = pieces.for_model(tiny_llama(LAYERS, self.heads, self.kv_heads, HEAD_DIM))
        self.generators = [torch.Generator().manual_seed(scene["seed"] + row) for row in rows]
        self.lengths = [scene["prompts"][row] for row in rows]
        longest = max(self.lengths)
        padding = torch.tensor([longest - length for length in self.lengths], dtype=torch.int32)
        positions = (torch.arange(longest)[None] - padding[:, None]).clamp(min=-1).to(torch.int32)
        self.pool = ModelPool()
        self.layers = [self.prompt(layer, longest, padding, positions) for layer in range(LAYERS)]

    def prompt(self, layer: int, longest: int, padding: Tensor, positions: Tensor) -> TextCompressor:
        keys, values = (self.padded(self.kv_heads, longest) for _ in range(2))
        queries = self.padded(self.heads, longest).transpose(1, 2)
        plan = text_plan(
            self.scene["budget"],
            interval=self.scene["interval"],
            sinks=self.pieces.selector.sinks,
            place=LayerPlace(layer, LAYERS),
        )
        return TextCompressor(
            self.pieces, plan, keys, values, padding, list(self.lengths), Asked(queries, positions, SCALE), self.pool
        )

    def padded(self, heads: int, longest: int) -> Tensor:
        """[B, heads, T, D] with NaN where there is padding."""
        tensor = torch.full((len(self.lengths), heads, longest, HEAD_DIM), float("nan"))
        for row, (count, generator) in enumerate(zip(self.lengths, self.generators, strict=True)):
            tensor[row, :, longest - count :] = torch.randn(heads, count, HEAD_DIM, generator=generator)
        return tensor

    def draw(self, heads: int, tokens: int) -> Tensor:
        return torch.stack([torch.randn(heads, tokens, HEAD_DIM, generator=g) for g in self.generators])

    def step(self, layer: TextCompressor) -> Tensor:
        query, keys, values = (self.draw(heads, 1) for heads in (self.heads, self.kv_heads, self.kv_heads))
        return layer.decode(query, keys, values, scale=SCALE)

    def chunk(self, layer: TextCompressor, tokens: int) -> Tensor:
        query, keys, values = (self.draw(heads, tokens) for heads in (self.heads, self.kv_heads, self.kv_heads))
        visible = torch.ones(len(self.lengths), tokens, dtype=torch.bool)
        return layer.append(query, keys, values, visible, scale=SCALE)

    def run(self, event: int) -> list[Tensor]:
        """A chunk of `-event` tokens, or one decoded token."""
        return [self.chunk(layer, -event) if event < 0 else self.step(layer) for layer in self.layers]

    def kept(self) -> Kept:
        return [
            [[set(head.tolist()) for head in heads] for heads in layer.store.kept_positions()] for layer in self.layers
        ]


def events(scene: dict[str, Any]) -> list[int]:
    """One entry per forward: 1 for a decoded token, negative for a chunk."""
    return [one for count in scene["after"] for one in ([1] * count if count > 0 else [count])]


def check(driver: Driver, before: Kept | None, new: int) -> None:
    """Everything that must hold after a forward of `new` tokens, given what was kept before it."""
    kept = driver.kept()
    for index, layer in enumerate(driver.layers):
        store = layer.store
        assert (store.length <= store.capacity).all()
        assert store.capacity.sum(-1).tolist() == store.row_slots
        assert int(store.length.max()) <= store.max_length
        assert [[len(head) for head in heads] for heads in kept[index]] == store.length.tolist()  # nothing twice
    first = driver.layers[0]
    # After a prompt, a chunk, or the last token of an interval.
    decided = before is None or new > 1 or first.decoded % first.plan.step == 0
    for row, (seen, entries) in enumerate(zip(first.row_seen, first.row_entries, strict=True)):
        total, everything = 0, 0
        for index, layer in enumerate(driver.layers):
            assert (layer.row_seen[row], layer.row_entries[row]) == (seen, entries)
            for head, there in enumerate(kept[index][row]):
                held = set(range(seen))
                if before is not None:
                    held = before[index][row][head] | set(range(seen - new, seen))
                assert there <= held
                assert seen - 1 in there
                assert there >= set(range(min(layer.row_condition[row], seen))) & held  # sinks
                if not decided or seen <= entries:
                    assert there == held
                    continue
                target = layer.row_condition[row] + int(layer.allocation.targets[row, head])
                assert len(there) == min(target, len(held))
                window = int(layer.allocation.windows[row, head])
                assert window >= 1
                assert there >= set(range(seen - window, seen)) & held
                total, everything = total + target, everything + len(there)
        if decided and seen > entries:
            uniform = LAYERS * driver.kv_heads * entries
            if isinstance(driver.pieces.allocator, RiskGate):
                assert everything <= total <= uniform
                continue
            # Local heads that leave their entries to nobody are an option, and off.
            assert total == uniform
            if isinstance(driver.scene["budget"], int):
                assert everything == uniform


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=8)
@given(scene=scenes())
def test_invariants_hold_after_every_token(name: str, scene: dict[str, Any]) -> None:
    driver = Driver(name, scene, list(range(len(scene["prompts"]))))
    check(driver, None, 0)
    for event in events(scene):
        before = driver.kept()
        for output in driver.run(event):
            assert torch.isfinite(output).all()
        check(driver, before, abs(event))


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=5)
@given(scene=scenes())
def test_rows_keep_what_they_would_keep_alone(name: str, scene: dict[str, Any]) -> None:
    rows = list(range(len(scene["prompts"])))
    together, alone = Driver(name, scene, rows), [Driver(name, scene, [row]) for row in rows]
    for event in events(scene):
        outputs = together.run(event)
        for row, driver in enumerate(alone):
            for one, both in zip(driver.run(event), outputs, strict=True):
                assert (one[0] - both[row]).abs().max() < 1e-4
    for row, driver in enumerate(alone):
        assert [layer[0] for layer in driver.kept()] == [layer[row] for layer in together.kept()]


@pytest.mark.parametrize("name", COMPRESSING)
@settings(max_examples=3)
@given(scene=scenes(), order=st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_copies_and_reordered_rows_are_independent(name: str, scene: dict[str, Any], order: list[int]) -> None:
    driver = Driver(name, scene, list(range(len(scene["prompts"]))))
    for event in events(scene)[:5]:
        driver.run(event)
    before, originals = driver.kept(), driver.layers
    for evicts in (False, True):
        driver.layers = [layer.copy(evicts=evicts) for layer in originals]
        assert driver.kept() == before
        held = before
        for event in (-4, 1, 1, 1, 1, 1, 1, 1, -30):
            driver.run(event)
            if evicts:
                check(driver, held, abs(event))
            held = driver.kept()
        if not evicts:
            new = set(range(41))
            for layer, old in zip(driver.layers, before, strict=True):
                grown = layer.store.kept_positions()
                for row, heads in enumerate(grown):
                    last = layer.row_seen[row] - len(new)
                    for head, positions in enumerate(heads):
                        assert set(positions.tolist()) == old[row][head] | {last + step for step in new}
    driver.layers = originals
    assert driver.kept() == before
    rows = [row % len(driver.lengths) for row in order]
    for layer in originals:
        layer.select_rows(torch.tensor(rows))
    driver.lengths = [driver.lengths[row] for row in rows]
    driver.generators = [torch.Generator().manual_seed(row) for row in rows]
    assert driver.kept() == [[layer[row] for row in rows] for layer in before]
    for _ in range(8):
        held = driver.kept()
        driver.run(1)
        check(driver, held, 1)


@pytest.mark.parametrize("budget", [40, 0.4])
def test_local_heads_may_leave_their_entries_to_nobody(budget: int | float) -> None:
    scene = {"budget": budget, "interval": 4, "prompts": [100], "kv_heads": 3, "group": 2, "seed": 0, "tau": 0.05}
    driver = Driver("headkv", {**scene, "options": {"redistribute": False, "local_window": 16, "window": 32}}, [0])
    types = {bool(label) for layer in driver.layers for label in layer.allocation.local.flatten()}
    assert types == {True, False}
    for _ in range(40):
        for layer, heads in zip(driver.layers, driver.kept(), strict=True):
            if layer.decoded % 4:
                continue
            entries = layer.row_entries[0]
            for kept, local in zip(heads[0], layer.allocation.local[0].tolist(), strict=True):
                # A share grows with the text, also that of a local head.
                assert len(kept) <= (4 + 16 * (entries - 4) / 36 + 1 if local else entries)
        driver.run(1)
    held = sum(len(head) for heads in driver.kept() for head in heads[0])
    assert held < LAYERS * 3 * driver.layers[0].row_entries[0]
