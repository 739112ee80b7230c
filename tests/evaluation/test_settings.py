# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from headkv_mm.compression import Compression
from headkv_mm.evaluation.settings import EvaluationSettings, budget_label, run_name, run_settings


def test_the_full_cache_comes_first_and_every_method_meets_every_budget_once() -> None:
    settings = EvaluationSettings(methods=("lines", "headkv", "lines"), budgets=(1 / 4, 1 / 6, 1 / 4))
    names = [run_name(item) for item in settings.compressions()]
    assert names == ["none", "lines-1of4", "lines-1of6", "headkv-1of4", "headkv-1of6"]


def test_all_methods_evict_first_after_the_same_rows() -> None:
    settings = EvaluationSettings(budgets=(1 / 6,), first_eviction_rows=5)
    runs = {item.method: item.kwargs for item in settings.compressions()}
    assert runs["headkv"] == {"grouping_rows": 5}
    assert runs["lines"] == runs["streaming"] == {"first_eviction_rows": 5}


def test_options_go_to_whom_they_belong() -> None:
    settings = EvaluationSettings(budgets=(1 / 6,), options=((None, "window_rows", 1.5), ("headkv", "tau", 0.8)))
    runs = {item.method: item.kwargs for item in settings.compressions()}
    assert runs["headkv"] == {"grouping_rows": 4, "window_rows": 1.5, "tau": 0.8}
    assert runs["lines"]["window_rows"] == 1.5
    assert "tau" not in runs["lines"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": 0}, "captions must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"budgets": ()}, "no budgets"),
        ({"methods": ("nonsense",)}, "unknown method 'nonsense'"),
        ({"options": (("headkv", "grouping_rows", 2),)}, "set it with first_eviction_rows"),
        ({"options": ((None, "colour", 2),)}, "none of the methods .* has an option 'colour'"),
        ({"methods": ("headkv",), "options": (("lines", "window_rows", 1),)}, "not evaluated: add 'lines'"),
        ({"options": (("headkv", "tau", 2.0),)}, "tau must lie in"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**arguments)  # type: ignore[arg-type]


def test_images_have_seeds_of_their_own() -> None:
    seeds = {EvaluationSettings(seed=seed).image_seed(index) for seed in range(3) for index in range(256)}
    assert len(seeds) == 3 * 256


@pytest.mark.parametrize(
    ("budget", "label"), [(1 / 6, "1/6"), (0.1666667, "1/6"), (0.3, "3/10"), (1.0, "1"), (0.1234, "0.1234"), (64, "64")]
)
def test_budgets_are_named_as_people_write_them(budget: float | int, label: str) -> None:
    assert budget_label(budget) == label


def test_a_run_is_known_by_everything_that_decides_its_outcome() -> None:
    shared = {"captions": 4}
    base = run_settings(shared, Compression("headkv", budget=1 / 6))
    assert base == run_settings(shared, Compression("headkv", budget=1 / 6))
    for other in (
        run_settings({"captions": 5}, Compression("headkv", budget=1 / 6)),
        run_settings(shared, Compression("headkv", budget=1 / 8)),
        run_settings(shared, Compression("headkv", budget=1 / 6, tau=0.8)),
    ):
        assert other != base
