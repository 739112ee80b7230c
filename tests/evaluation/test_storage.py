# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headkv_mm.evaluation import storage


def test_json_comes_back_rounded_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "a" / "result.json"
    storage.write_json(path, {"share": 1 / 3, "flags": [1, 0, 1], "rows": [{"a": [0.1, 0.2]}], "none": None})
    assert storage.read_json(path) == {
        "share": 0.3333333,
        "flags": [1, 0, 1],
        "rows": [{"a": [0.1, 0.2]}],
        "none": None,
    }
    assert '"flags": [1, 0, 1]' in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    storage.write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        storage.write_json(tmp_path / "result.json", {"kl": [0.0, float("nan")]})
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is no JSON .* delete it"):
        storage.read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        storage.read_json(path)


def test_what_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    storage.check_same(path, {"a": {"b": 1 / 3}}, {"a": {"b": 0.3333333}})
    with pytest.raises(ValueError, match=r"a\.b 1 instead of 2.*--output"):
        storage.check_same(path, {"a": {"b": 1}}, {"a": {"b": 2}})
    with pytest.raises(ValueError, match="None instead of 2"):
        storage.check_same(path, {}, {"a": {"b": 2}})


def test_tokens_come_back_with_the_settings_they_belong_to(tmp_path: Path) -> None:
    path, tokens = tmp_path / "tokens.safetensors", torch.randint(369, (3, 256))
    assert storage.read_tokens(path, {"seed": 1}) is None
    storage.write_tokens(path, tokens, {"seed": 1})
    found = storage.read_tokens(path, {"seed": 1})
    assert found is not None
    assert found.dtype == torch.int64
    assert torch.equal(found, tokens)
    with pytest.raises(ValueError, match="seed 1 instead of 2"):
        storage.read_tokens(path, {"seed": 2})
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        storage.read_tokens(path, {"seed": 1})
