# SPDX-License-Identifier: Apache-2.0
"""The benchmark of all methods' times runs, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = ["--tokens", "256", "--answer", "20", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the tests after this one keep theirs
    return importlib.import_module("method_times")


def test_methods_are_measured_beside_the_stock_cache(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "times.json"
    named = ["snapkv", "headkv-r2", "compresskv", "compilerkv", "fastkv"]  # three of them need tables
    arguments = ["--methods", ",".join(named), "--rounds", "2", *TINY, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["method_times.py", *arguments])
    benchmark.main()
    content = json.loads(path.read_text())
    assert content["gate"] == "passed"
    assert [run["method"] for run in content["results"]] == named
    for run in content["results"]:
        assert run["prefill_ratio"] > 0
        assert len(run["decode_ratios"]) == 2
        assert run["nbytes"] < 0.7 * run["nbytes_full"]


def test_a_method_that_changes_logits_is_not_timed(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = benchmark.Bench.cache
    monkeypatch.setattr(benchmark.Bench, "cache", lambda self, method, budget: original(self, method, min(budget, 0.5)))
    path = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["method_times.py", "--methods", "snapkv", *TINY, "--json", str(path)])
    with pytest.raises(SystemExit, match="snapkv with a budget of 100 % changes the logits"):
        benchmark.main()
    assert not path.exists()


def test_an_unknown_method_is_refused(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["method_times.py", "--methods", "snapkv,lines"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "no method lines for text" in capsys.readouterr().err
