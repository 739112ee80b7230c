# SPDX-License-Identifier: Apache-2.0
"""Numbers of the comparison of two depths."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def depth_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("depth_tables")


def test_variation_is_the_standard_deviation_over_the_mean(depth_tables: ModuleType) -> None:
    assert depth_tables.variation([2.0, 2.0]) == 0
    assert depth_tables.variation([1.0, 3.0]) == pytest.approx(0.5)
    assert depth_tables.variation([10.0, 30.0]) == pytest.approx(0.5)


def test_gini_tells_how_unevenly_needs_are_spread(depth_tables: ModuleType) -> None:
    assert depth_tables.gini([4.0, 4.0, 4.0]) == 0
    assert depth_tables.gini([0.0, 0.0, 0.0, 7.0]) == pytest.approx(0.75)
    assert depth_tables.gini([1.0, 3.0]) == pytest.approx(0.25)
