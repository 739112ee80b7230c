# SPDX-License-Identifier: Apache-2.0
"""Compression, budgets, grids and the registry: what may be written, and what the errors say."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headkv_mm import Compression, ImageGrid, methods, register_method
from headkv_mm.allocators import Uniform
from headkv_mm.budgets import ImagePlan, image_plan, parse_budget
from headkv_mm.registry import Pieces, get_method
from headkv_mm.schedules import EachRow
from headkv_mm.scorers import Recency
from headkv_mm.selectors import Stratified


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("1/6", 1 / 6),
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("64", 64),
        ("512MiB", "512MiB"),
        (" 1 / 4 ", 0.25),
        ("1.5KB", "1.5KB"),
    ],
)
def test_budgets_are_read_from_text(text: str, budget: object) -> None:
    parsed = parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


@pytest.mark.parametrize(
    "text", ["", "0", "0.0", "-1", "3/2", "1/0", "1e400", "nan", "inf", "many", "12 apples", "0MiB"]
)
def test_bad_budget_texts_say_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"budget .*expected a fraction in \(0, 1\]"):
        parse_budget(text)


def test_every_form_of_a_compression_is_the_same() -> None:
    expected = Compression("headkv", budget=0.25, tau=0.95)
    assert Compression.parse({"method": "headkv", "budget": 0.25, "tau": 0.95}) == expected
    assert Compression.parse("headkv", budget=0.25, tau=0.95) == expected
    assert Compression.parse(Compression("headkv", tau=0.95), budget=0.25) == expected
    assert Compression.parse(expected.to_dict()) == expected
    assert hash(Compression.parse(expected)) == hash(expected)
    assert Compression.parse(None).method == "none"
    assert str(expected) == "headkv(0.25, tau=0.95)"


def test_a_compression_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Compression("headkv").budget = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": 3}, TypeError, "method must be a name"),
        ({"method": "headkv", "budget": None}, TypeError, "budget must be a number or text, got NoneType"),
        ({"method": "headkv", "budget": True}, TypeError, "budget must be a number or text, got bool"),
        ({"method": "none", "tau": 0.5}, ValueError, "its options are: none"),
        ({"method": "headkv", "tau": 0.0}, ValueError, r"tau must lie in \(0, 1\]"),
        ({"method": "headkv", "tau": "high"}, ValueError, "tau must be a number"),
        ({"method": "headkv", "share_labels": 1}, ValueError, "share_labels must be True or False"),
        ({"method": "headkv", "score": "l2"}, ValueError, "score must be 'logits' or 'softmax'"),
        ({"method": "headkv", "strata_ratio": 1.5}, ValueError, r"strata_ratio must lie in \[0, 1\]"),
        ({"method": "headkv", "grouping_rows": 0}, ValueError, "grouping_rows must be a whole number of rows"),
        ({"method": "headkv", "grouping_queries": 0}, ValueError, "grouping_queries must be at least 1"),
        ({"method": "lines", "first_eviction_rows": 0}, ValueError, "first_eviction_rows must be a whole number"),
        ({"method": "lines", "anchor_rows": -1}, ValueError, "anchor_rows must not be negative"),
        ({"method": "lines", "window_rows": -1}, ValueError, "window_rows must not be negative"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Compression(**arguments)  # type: ignore[arg-type]


def test_parse_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="must be a method name"):
        Compression.parse(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the key 'method'"):
        Compression.parse({"budget": 0.5})


def test_options_reach_every_piece_that_has_them_and_pieces_can_be_swapped() -> None:
    method = get_method("headkv").with_options({"window_rows": 3.0, "strata_ratio": 0.6})
    assert (method.image.allocator.window_rows, method.image.selector.strata_ratio) == (3.0, 0.6)
    assert method.text.selector.strata_ratio == 0.6
    swapped = get_method("headkv").with_options({"allocator": Uniform()})
    assert swapped.image.allocator == swapped.text.allocator == Uniform()
    with pytest.raises(ValueError, match="no option 'tau'"):
        get_method("headkv").with_options({"allocator": Uniform(), "tau": 0.5})


def test_a_piece_may_be_named_by_a_method_that_has_it() -> None:
    pieces = Compression("adakv", scorer="expected-attention", window=8).pieces("text")
    assert pieces.scorer == get_method("expected-attention").text.scorer
    assert pieces.allocator == get_method("adakv").with_options({"window": 8}).text.allocator
    assert Compression.parse(Compression("adakv", scorer="keydiff").to_dict()) == Compression("adakv", scorer="keydiff")
    with pytest.raises(ValueError, match="unknown method 'keydif'"):
        Compression("adakv", scorer="keydif")
    with pytest.raises(ValueError, match="method 'none' has no scorer"):
        Compression("adakv", scorer="none")


def test_defaults_of_the_paper() -> None:
    assert get_method("headkv").image.options == {
        "score": "logits",
        "tau": 0.9,
        "window": 32,
        "local_window": 64,
        "window_rows": 2.0,
        "grouping_queries": None,
        "include_condition": False,
        "share_labels": False,
        "redistribute": True,
        "strata_ratio": 0.5,
        "anchor_rows": 0.0,
        "sinks": 4,
        "grouping_rows": 4,
        "regroup_rows": None,
    }


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from headkv_mm import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    pieces = Pieces(Recency(), Uniform(), Stratified(0.0), EachRow(2))
    register_method("mine", image=pieces, description="Mine.")
    assert "mine" in methods()
    assert "mine" in methods("image")
    assert "mine" not in methods("text")
    assert Compression("mine", first_eviction_rows=3).pieces("image").schedule == EachRow(3)
    with pytest.raises(ValueError, match=r"'mine' serves image only; methods for text are: none, .*headkv"):
        Compression("mine").pieces("text")
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_method("mine", text=pieces)
    with pytest.raises(ValueError, match="needs pieces for images, for texts"):
        register_method("nothing")


def test_options_of_the_other_kind_are_refused_where_they_would_be_ignored() -> None:
    rows = Compression("headkv", grouping_rows=3)
    assert rows.pieces("image").schedule.grouping_rows == 3
    with pytest.raises(ValueError, match="'grouping_rows' of method 'headkv' does not serve text"):
        rows.pieces("text")
    with pytest.raises(ValueError, match="'interval' of method 'headkv' does not serve image"):
        Compression("headkv", interval=7).pieces("image")
    with pytest.raises(ValueError, match="kind must be one of image, text, got 'sound'"):
        methods("sound")


@given(row=st.integers(2, 64), height=st.integers(3, 64), data=st.data())
def test_windows_are_at_least_one_row_and_two_and_leave_room(row: int, height: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(row + 2, row * height))
    plan = ImagePlan(tokens=row * height, row=row, budget=budget)
    window = plan.window(data.draw(st.floats(0, 4)))
    assert row + 2 <= window <= max(budget, row + 2)
    if budget >= 3 * row and row >= 2:
        assert plan.window(2) == 2 * row  # the paper's window at the paper's budgets


def test_fractions_are_of_the_image() -> None:
    assert image_plan(1 / 6, ImageGrid(24, 24)).budget == 96
    assert image_plan(1 / 6, ImageGrid(16, 16)).budget == 43
    assert image_plan(1.0, ImageGrid(16, 16)).keeps_all
    assert image_plan(9999, ImageGrid(16, 16)).keeps_all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0, "width": 4}, "height must be a positive integer"),
        ({"height": 4, "width": 2.5}, "width must be a positive integer"),
        ({"height": 4, "width": 4, "row_stride": 3}, "at least the width"),
        ({"height": 4, "width": 4, "start": -1}, "must not be negative"),
    ],
)
def test_bad_grids_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageGrid(**arguments)  # type: ignore[arg-type]


def test_grids_are_read_from_configurations() -> None:
    from transformers import JanusConfig, LlamaConfig

    assert ImageGrid.from_config(JanusConfig()) == ImageGrid(24, 24)
    assert ImageGrid.from_config(LlamaConfig()) is None
    assert ImageGrid(4, 8, row_stride=9).tokens == 36
