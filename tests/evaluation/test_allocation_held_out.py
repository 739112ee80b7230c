# SPDX-License-Identifier: Apache-2.0
"""Seeds are pooled item by item, verdicts follow from the intervals, and the script runs on small models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .text_model import small_text_model, tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pooling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("allocation_pooling")


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("allocation_held_out")


def images(seed: int, right: dict[str, list[int]], *, budget: float = 0.25, held: float = 30.0) -> dict[str, Any]:
    """What an evaluation of images writes, as far as it is pooled."""
    runs = [
        {
            "method": method,
            "budget": None if method == "none" else budget,
            "options": {},
            "bytes_per_image": {"nbytes": 100.0 if method == "none" else held, "nbytes_full": 100.0},
            "outcomes": {"all_right": values},
            "fidelity": None if method == "none" else {"kl": [0.5 * seed for _ in values]},
        }
        for method, values in right.items()
    ]
    return {"settings": {"seed": seed, "captions": 2, "model": "m", "resamples": 1}, "runs": runs}


def test_items_of_all_seeds_are_pooled(pooling: Any) -> None:
    contents = {
        1: images(1, {"none": [1, 1], "mine": [1, 1], "other": [1, 0]}, held=20.0),
        2: images(2, {"none": [1, 1], "mine": [1, 0], "other": [0, 0]}, held=40.0),
    }
    found = pooling.pool(contents, "images", "mine", 500)
    assert found["items"] == 4
    assert found["settings"] == {"captions": 2, "model": "m", "seeds": [1, 2], "chosen": "mine", "resamples": 500}
    by_method = {run["method"]: run for run in found["runs"]}
    assert by_method["mine"]["right"]["mean"] == 0.75
    assert by_method["mine"]["right"]["captions"] == 4
    assert by_method["mine"]["kl"]["mean"] == pytest.approx(0.75)
    assert by_method["mine"]["bytes_ratio"] == pytest.approx(0.3)
    assert by_method["mine"]["by_seed"] == {"1": {"right": 1.0, "kl": 0.5}, "2": {"right": 0.5, "kl": 1.0}}
    assert by_method["none"]["kl"] is None
    differences = {line["method"]: line for line in found["differences"]}
    assert differences["other"]["right"]["mean"] == 0.5
    assert differences["none"]["right"]["mean"] == -0.25
    assert differences["none"]["kl"] is None


def test_differences_are_paired(pooling: Any) -> None:
    values = [1, 0] * 20
    found = pooling.pool({1: images(1, {"mine": values, "other": values})}, "images", "mine", 200)
    (line,) = found["differences"]
    assert (line["right"]["low"], line["right"]["high"]) == (0.0, 0.0)  # the same items differ in nothing
    (own, _) = found["runs"]
    assert own["right"]["low"] < 0.5 < own["right"]["high"]


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ((0.6, 0.8), (0.1, 0.5), "better"),
        ((0.5, 0.8), (0.1, 0.5), "overlapping"),
        ((0.1, 0.2), (0.3, 0.4), "worse"),
    ],
)
def test_sides_follow_from_intervals(
    pooling: Any, own: tuple[float, float], other: tuple[float, float], expected: str
) -> None:
    mine, theirs = ({"low": low, "high": high} for low, high in (own, other))
    assert pooling.side(mine, theirs, True) == expected
    opposite = {"better": "worse", "worse": "better", "overlapping": "overlapping"}
    assert pooling.side(mine, theirs, False) == opposite[expected]


def test_verdicts_name_methods_budget_by_budget(pooling: Any) -> None:
    good, bad = [1] * 30, [0] * 30
    contents = {3: images(3, {"none": good, "mine": good, "weak": bad, "equal": good})}
    contents[3]["runs"][2]["bytes_per_image"]["nbytes"] = 29.0
    right, kl = pooling.pool(contents, "images", "mine", 50)["verdicts"]
    assert right == {
        "budget": 0.25,
        "measure": "right",
        "better": ["weak"],
        "overlapping": ["equal"],
        "worse": [],
        "more_bytes_than": ["weak"],
    }
    assert kl["overlapping"] == ["weak", "equal"]


def test_resamples_keep_every_group(pooling: Any) -> None:
    groups = ["a", "b", "a", "b", "b"]
    counts = pooling.counts_within(groups, 20)
    assert (counts[:, [0, 2]].sum(1) == 2).all()
    assert (counts[:, [1, 3, 4]].sum(1) == 3).all()
    assert len(np.unique(counts, axis=0)) > 1


def test_what_does_not_fit_together_is_refused(pooling: Any) -> None:
    one, two = images(1, {"mine": [1, 0]}), images(2, {"mine": [1, 0], "more": [1, 1]})
    with pytest.raises(ValueError, match="seed 2 has other methods"):
        pooling.pool({1: one, 2: two}, "images", "mine", 10)
    two = images(2, {"mine": [1, 0]})
    two["settings"]["model"] = "n"
    with pytest.raises(ValueError, match="seed 2 was evaluated with other settings"):
        pooling.pool({1: one, 2: two}, "images", "mine", 10)
    with pytest.raises(ValueError, match="'theirs' was not evaluated"):
        pooling.pool({1: one}, "images", "theirs", 10)


def test_the_script_pools_documents_and_goes_on(
    held_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_text_model()
    monkeypatch.setattr(held_out, "open_text_model", lambda *_: (model, tokenizer()))
    arguments = ["text", "--methods", "none,keydiff,pointed", "--seeds", "1,2", "--documents", "1", "--budgets", "1/4"]
    arguments += ["--length", "192", "--resamples", "20", "--no-progress", "--output", str(tmp_path)]
    held_out.main([*arguments, "--runs", str(tmp_path / "runs")])
    content = json.loads((tmp_path / "results.json").read_text())["text"]
    assert content["items"] == 2 * 7
    assert {run["method"] for run in content["runs"]} == {"none", "streaming", "random", "keydiff", "pointed"}
    assert {line["method"] for line in content["differences"]} == {"none", "streaming", "random", "keydiff"}
    assert all(run["options"] == {} for run in content["runs"])
    means = [
        json.loads((tmp_path / "runs" / seed / "results.json").read_text())["runs"][-1]["summary"]["exact"]["mean"]
        for seed in ("1", "2")
    ]
    assert content["runs"][-1]["right"]["mean"] == pytest.approx(np.mean(means))
    assert "| `keydiff` | 1/4 |" in (tmp_path / "table.md").read_text()
    capsys.readouterr()

    def forbidden(*_: Any) -> Any:
        raise AssertionError("ran again")

    monkeypatch.setattr(model, "forward", forbidden)
    held_out.main([*arguments, "--runs", str(tmp_path / "runs")])
    again = json.loads((tmp_path / "results.json").read_text())["text"]
    assert {**again, "origin": {}} == {**content, "origin": {}}  # whose commit may be another by now


def test_a_chosen_rule_must_be_compared(held_out: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--runs", str(tmp_path), "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        held_out.main(["images", "--methods", "headkv", "--chosen", "lines", *folders])
    assert "the chosen rule lines is not among the methods headkv" in capsys.readouterr().err
