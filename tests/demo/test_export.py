# SPDX-License-Identifier: Apache-2.0
"""Model folders appear whole or not at all, and replace nothing but model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headkv_mm.demo.export import check_output, new_model_folder, write_texts


def test_only_model_folders_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(ValueError, match="is no model folder"):
        check_output(tmp_path)
    with pytest.raises(ValueError, match="is no model folder"):
        check_output(tmp_path / "notes.txt")
    check_output(tmp_path / "new")
    with pytest.raises(ValueError, match="is no model folder"), new_model_folder(tmp_path):
        pytest.fail("nothing is written")


def test_an_error_leaves_the_old_model_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"
    for text, fails in (("old", False), ("new", True)):
        try:
            with new_model_folder(folder) as new:
                new.mkdir()
                (new / "config.json").write_text(text, encoding="utf-8")
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
    assert (folder / "config.json").read_text(encoding="utf-8") == "old"
    assert [item.name for item in folder.parent.iterdir()] == ["one"]


def test_card_and_scores_can_be_written_again(tmp_path: Path) -> None:
    for number in (1, 2):
        write_texts(tmp_path, f"# {number}", {"right": number}, {"seed": 0})
    assert {item.name: item.read_text(encoding="utf-8") for item in tmp_path.iterdir()} == {
        "README.md": "# 2",
        "evaluation.json": json.dumps({"training": {"seed": 0}, "right": 2}, indent=2) + "\n",
    }
