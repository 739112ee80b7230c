# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmarks report nothing about a kernel that is wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SMALL = ["--layers", "2", "--rows", "4", "--tokens", "60", "--repeats", "3", "--threads", "1"]


def script(name: str) -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, specification.name, module)  # dataclasses look there
        specification.loader.exec_module(module)
        yield module
    torch.set_num_threads(before)


@pytest.fixture
def benchmark() -> Iterator[ModuleType]:
    yield from script("ragged_decode")


@pytest.fixture
def scores_benchmark() -> Iterator[ModuleType]:
    yield from script("window_scores")


def test_report(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*SMALL, "--json", str(tmp_path / "new" / "report.json")]) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [result["distribution"] for result in report["results"]] == ["uniform", "skewed"]
    for result in report["results"]:
        assert result["byte_ratio"] > 1
        assert 0 < result["largest_error"] < 1e-5
        assert result["speedup_cpu"] == pytest.approx(result["dense_cpu_ms"] / result["ours_cpu_ms"])
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [lambda out: out * 1.001, lambda out: out * float("nan")])
def test_wrong_kernel_is_not_timed(
    benchmark: ModuleType, spoil: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = benchmark.kernels.append_decode
    monkeypatch.setattr(benchmark.kernels, "append_decode", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    with pytest.raises(SystemExit, match="no speed-up is reported"):
        benchmark.main(SMALL)
    assert capsys.readouterr().out == ""


def test_share_of_a_long_context(benchmark: ModuleType, tmp_path: Path) -> None:
    arguments = [*SMALL, "--batch", "1", "--group", "2", "--distributions", "equal", "--keep", "0.1"]
    assert benchmark.main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["byte_ratio"] == pytest.approx(10)


def test_report_of_scores(scores_benchmark: ModuleType, tmp_path: Path) -> None:
    arguments = ["--tokens", "200", "--windows", "8", "all", "--repeats", "2"]
    assert scores_benchmark.main([*arguments, "--json", str(tmp_path / "report.json")]) == 0
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [result["window"] for result in results] == [8, 200]
    assert all(result["largest_error"] < 1e-5 and result["share_of_attention"] > 0 for result in results)


def test_wrong_scores_are_not_timed(scores_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scores_benchmark.kernels.window_scores
    monkeypatch.setattr(scores_benchmark.kernels, "window_scores", lambda *a, **k: right(*a, **k) + 1e-4)
    with pytest.raises(SystemExit, match="not timed"):
        scores_benchmark.main(["--tokens", "50", "--windows", "8"])
