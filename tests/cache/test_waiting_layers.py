# SPDX-License-Identifier: Apache-2.0
"""Layers of a text that wait for one another: they keep what they would keep if each held everything, in few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from headkv_mm import HeadKVCache
from headkv_mm.allocators import MassCurves, Pooled, Proportional
from headkv_mm.model_pool import ModelPool
from headkv_mm.pieces import Allocator
from headkv_mm.selectors import Stratified

from .test_text_properties import Driver, events
from .test_text_properties import scenes as text_scenes

FORMS: dict[str, Allocator] = {
    "pooled": Pooled(window=4, scope="model", candidates=1000),
    "pooled alone": Pooled(window=4, scope="model", candidates=1000, alpha=0.0),
    "curves": MassCurves(window=4, scope="model", most=8.0),
    "largest loss": MassCurves(window=4, scope="model", loss="largest", floor=0.0, most=3.0),
    "pointed": Proportional(window=4, scope="model", statistic="pointed", contrast=8.0, most=16.0, grouping_queries=16),
    "entropy": Proportional(window=4, scope="model", contrast=3.0, most=2.0),
    "keys": Proportional(window=4, scope="model", statistic="keys", contrast=40.0, floor=0.0, most=16.0),
}


@dataclass(frozen=True)
class AtOnce(Stratified):
    """The same lowest scores, but nothing leaves before the last layer has come that a head could ever get."""

    @property
    def nested(self) -> bool:
        return False


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12)
@given(scene=text_scenes())
def test_what_is_kept_is_that_of_layers_that_hold_everything(form: str, scene: dict[str, Any]) -> None:
    rows = list(range(len(scene["prompts"])))
    narrowed, at_once = (
        Driver("keydiff", {**scene, "options": {"allocator": FORMS[form], "selector": selector}}, rows)
        for selector in (Stratified(strata_ratio=0.0), AtOnce(strata_ratio=0.0))
    )
    assert narrowed.kept() == at_once.kept()
    for event in events(scene):
        for driver in (narrowed, at_once):
            driver.run(event)
        assert narrowed.kept() == at_once.kept()
    for one, other in zip(narrowed.layers, at_once.layers, strict=True):
        assert one.noted is None
        if one.allocation is not None:
            assert one.allocation.targets.tolist() == other.allocation.targets.tolist()


@lru_cache(maxsize=1)
def embedded() -> Any:
    from headkv_mm.evaluation.text.runner import open_text_model

    return open_text_model(None, "cpu")[0]


TOKENS = 1200


def filled(budget: float, allocator: Allocator) -> HeadKVCache:
    ids = torch.randint(3, 400, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    cache = HeadKVCache(embedded(), "keydiff", budget=budget, allocator=allocator)
    with torch.no_grad():
        embedded()(ids, past_key_values=cache)
    return cache


ON_MODEL: dict[str, Allocator] = {
    "pointed, up to 4": Proportional(
        window=8, scope="model", statistic="pointed", contrast=8.0, grouping_queries=64, most=4.0
    ),
    "pointed, up to 16": Proportional(
        window=8, scope="model", statistic="pointed", contrast=8.0, grouping_queries=64, most=16.0
    ),
    "curves": MassCurves(window=8, scope="model"),
    "pooled": Pooled(window=8, scope="model"),
}


@pytest.mark.parametrize("budget", [1 / 4, 1 / 8])
@pytest.mark.parametrize("form", ON_MODEL)
def test_what_waits_is_about_the_budget_of_the_model(form: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    held, note = [], ModelPool.note

    def noted(pool: ModelPool, index: int, nbytes: int, *, passing: int = 0) -> None:
        note(pool, index, nbytes, passing=passing)
        held.append((sum(pool._held.values()), passing))

    monkeypatch.setattr(ModelPool, "note", noted)
    cache = filled(budget, ON_MODEL[form])
    layer = 1 / len(cache)  # of the full cache: what one layer holds before it chooses
    full = cache.nbytes_full
    assert max(total for total, _ in held) / full < budget + layer + 0.1
    # Beside that, one layer is copied: what it holds waits no longer when its copy is there.
    largest = max(passing for _, passing in held if passing < layer * full) / full
    assert cache.nbytes_peak / full < budget + layer + largest + 0.1
    assert cache.nbytes < (budget + 0.01) * full
    if budget == 1 / 8:
        assert cache.nbytes_peak / full < 0.55
