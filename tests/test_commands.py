# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from headkv_mm import cli
from headkv_mm.commands import compile_kernels, doctor
from headkv_mm.commands.output_folder import OutputFolder


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "compile_cpu_kernels", lambda dtypes: 0.0)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["kernels"]["cpu_difference"] < 1e-3
    assert found["embedded_model"]["parameters"] > 1_000_000
    monkeypatch.setattr("headkv_mm.demo.image_model_path", lambda: tmp_path)
    assert cli.main(["doctor"]) == 1
    assert f"BROKEN: ValueError: {tmp_path} has no config.json" in capsys.readouterr().out


def test_doctor_finds_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from headkv_mm.kernels import dispatch, reference

    monkeypatch.setattr(doctor, "compile_cpu_kernels", lambda dtypes: 0.0)
    monkeypatch.setattr(dispatch, "ragged_decode", lambda *args, **kwargs: 2 * reference.ragged_decode(*args, **kwargs))
    found = doctor.examine()
    assert not found["ok"]
    assert "differ from plain torch" in found["kernels"]["error"]


def test_compiling_is_announced_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from headkv_mm.kernels import cpu

    asked: list[Any] = []

    def slow(dtypes: Any) -> None:
        asked.extend(dtypes)
        time.sleep(0.3)

    monkeypatch.setattr(cpu, "warm_up", slow)
    monkeypatch.setattr(compile_kernels, "_PATIENCE", 0.05)
    monkeypatch.delenv("HEADKV_MM_KERNELS", raising=False)
    assert compile_kernels.compile_cpu_kernels((torch.float32, torch.float64)) >= 0.3
    assert asked == [torch.float32], "float64 has no compiled kernels"
    assert "compiling the CPU kernels" in capsys.readouterr().err


def test_output_folder_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    with OutputFolder(tmp_path) as folder:
        folder.new("new.txt").write_text("new")
        folder.write_json("data.json", {"é": 1})
        assert not (tmp_path / "new.txt").exists(), "nothing appears before the end"
    assert {file.name for file in tmp_path.iterdir()} == {"old.txt", "new.txt", "data.json"}
    assert json.loads((tmp_path / "data.json").read_text()) == {"é": 1}
    with pytest.raises(RuntimeError, match="with statement"):
        folder.new("late.txt")


def test_output_folder_leaves_other_peoples_files(tmp_path: Path) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "a" / "b") as folder:
            folder.new("x").write_text("x")
            (tmp_path / "a" / "theirs").write_text("theirs")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/theirs"]
