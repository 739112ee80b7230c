# SPDX-License-Identifier: Apache-2.0
"""Folders that were damaged, cannot be written, or hold something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import batch_support as support
import pytest

from headkv_mm.batch import folder as folder_module
from headkv_mm.batch.files import read_lines
from headkv_mm.batch.folder import ImageFolder
from headkv_mm.batch.jobs import Job
from headkv_mm.batch.prompts import parse_prompts
from headkv_mm.batch.records import Drawn
from headkv_mm.batch.settings import BatchSettings, differences

PROMPTS = support.text_list(5)


def drawn_by(path: Path, **more: Any) -> list[str]:
    """Names of the images that a run draws."""
    names: list[str] = []

    def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
        names.extend(job.name for job in jobs)
        return support.draw(jobs)

    support.run(path, PROMPTS, draw=draw, **more)
    return names


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    assert len(drawn_by(tmp_path)) == 5
    before = support.contents(tmp_path)
    assert drawn_by(tmp_path, ranks=3) == []
    assert support.contents(tmp_path) == before
    (record, *_) = read_lines(tmp_path / "manifest.jsonl")
    assert (record["id"], record["prompt"], record["class"], record["seed"]) == ("00001", "picture 0", None, 0)
    assert record["settings"] == json.loads((tmp_path / "config.json").read_text())["settings_hash"]


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda path: halve(path / "manifest.jsonl"), ["00003", "00004", "00005"]),
        (lambda path: (path / "manifest.jsonl").unlink(), ["00001", "00002", "00003", "00004", "00005"]),
        (lambda path: (path / "manifest.jsonl").write_bytes(b"\xff\n[]\n{}\n" * 3), None),
        (lambda path: (path / "00002.png").unlink(), ["00001", "00002"]),
        (lambda path: halve(path / "00005.png"), ["00005"]),
        (lambda path: halve(path / "config.json"), []),
        (lambda path: (path / "config.json").unlink(), []),
        (lambda path: (path / ".headkv-mm" / "staging" / "rest").mkdir(parents=True), []),
        (lambda path: (path / ".headkv-mm" / "done" / "foreign").mkdir(parents=True), []),
    ],
    ids=[
        "half manifest",
        "no manifest",
        "junk",
        "no image",
        "half image",
        "half config",
        "no config",
        "rest",
        "foreign",
    ],
)
def test_damage_is_mended(tmp_path: Path, damage: Callable[[Path], object], again: list[str] | None) -> None:
    support.run(tmp_path, PROMPTS)
    before = support.contents(tmp_path)
    damage(tmp_path)
    names = drawn_by(tmp_path)  # with the company they had
    assert len(names) == 5 if again is None else sorted(names) == again
    assert support.contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_half_record_of_a_finished_batch(tmp_path: Path) -> None:
    support.run(tmp_path / "good", PROMPTS)
    steps = support.count_steps(lambda: support.run(tmp_path / "counted", PROMPTS))
    support.die_at(steps // 2, lambda: support.run(tmp_path / "out", PROMPTS), before=True)
    (record, *_) = (tmp_path / "out").glob(".headkv-mm/done/*/records.jsonl")
    halve(record)
    support.run(tmp_path / "out", PROMPTS)
    assert support.contents(tmp_path / "out") == support.contents(tmp_path / "good")


def other(batch_size: int) -> BatchSettings:
    return BatchSettings({"batch_size": batch_size, "budget": 0.5}, {"versions": {"torch": "1"}})


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    support.run(tmp_path, PROMPTS)
    before = support.contents(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(budget 0.25, now 0.5\)"):
        support.run(tmp_path, PROMPTS, settings=other)
    with pytest.raises(ValueError, match=r"other settings \(batch_size 2, now 3\)"):
        support.run(tmp_path, PROMPTS, batch_size=3)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing or damaged"):
        support.run(tmp_path, PROMPTS, settings=other)
    assert before == {"config.json": before["config.json"], **support.contents(tmp_path)}


def test_a_folder_without_an_image_takes_other_settings(tmp_path: Path) -> None:
    def refuse(job: Job) -> None:
        raise ValueError("no")

    support.run(tmp_path, PROMPTS, check=refuse)
    assert len(drawn_by(tmp_path, settings=other, batch_size=4)) == 5
    assert not (tmp_path / "failed.jsonl").exists()


def test_the_recorded_batch_size_is_used_again(tmp_path: Path) -> None:
    support.run(tmp_path, PROMPTS, batch_size=4)
    (tmp_path / "00002.png").unlink()
    assert drawn_by(tmp_path) == ["00001", "00002", "00003", "00004"]


def test_another_image_by_the_same_name(tmp_path: Path) -> None:
    support.run(tmp_path, PROMPTS)
    changed = parse_prompts(b"picture 0\npicture one", objects=False, source="x")
    with pytest.raises(ValueError, match=r"name '00002' \(prompt 'picture 1', now 'picture one'\)"):
        support.run(tmp_path, changed)


def test_a_longer_list_and_a_shorter_one(tmp_path: Path) -> None:
    support.run(tmp_path, support.text_list(2))
    assert drawn_by(tmp_path) == ["00003", "00004", "00005"]
    support.run(tmp_path, support.text_list(1))
    names = [record["file"] for record in read_lines(tmp_path / "manifest.jsonl")]
    assert names == [f"{number:05d}.png" for number in range(1, 6)], "images of other lists stay in the manifest"


def test_failures_are_written_down_and_tried_again(tmp_path: Path) -> None:
    def check(job: Job) -> None:
        if job.name == "00002":
            raise ValueError("a word\nnobody knows")

    def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
        if any(job.name == "00003" for job in jobs):
            raise ValueError("too long")
        return support.draw(jobs)

    prompts = parse_prompts(
        b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n{"prompt": "d"}\n{"prompt"\n{"prompt": "f"}',
        objects=True,
        source="x",
    )
    support.run(tmp_path, prompts, check=check, draw=draw)
    failed = read_lines(tmp_path / "failed.jsonl")
    assert [(item["line"], item["id"]) for item in failed] == [(2, "00002"), (3, "00003"), (5, None)]
    assert [item["error"] for item in failed[:2]] == ["a word nobody knows", "too long"]
    assert {file.stem for file in tmp_path.glob("*.png")} == {"00001", "00004", "00006"}
    again = support.run(tmp_path, prompts)
    assert sum(share.drawn for share in again) == 2, "a rerun tries them again"
    assert [item["line"] for item in read_lines(tmp_path / "failed.jsonl")] == [5]


def test_a_bug_is_no_failure_of_a_prompt(tmp_path: Path) -> None:
    def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        support.run(tmp_path, PROMPTS, draw=draw)


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError) as caught:
        ImageFolder(tmp_path / "file" / "out").open()
    assert caught.value.filename == str(tmp_path / "file" / "out")

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(OSError, match="Read-only file system"):
            ImageFolder(tmp_path).open()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError) as caught:
        ImageFolder(tmp_path).open()
    assert caught.value.filename == str(tmp_path)


def test_an_error_leaves_no_folder_behind(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "a" / "b")
    folder.open()
    folder.abandon()
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second = ImageFolder(tmp_path), ImageFolder(tmp_path)
    first.open()
    with pytest.raises(ValueError, match="being written by another run"):
        second.open()
    first.join()
    third = ImageFolder(tmp_path)
    third.join()  # another process of the first run
    with pytest.raises(ValueError, match="being written by another run"):
        second.open()
    first.abandon()
    third.abandon()
    second.open()
    second.abandon()


def test_a_folder_that_other_machines_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.1)
    with pytest.raises(ValueError, match="not the same folder on all machines"):
        ImageFolder(tmp_path / "elsewhere").join()


def test_differences() -> None:
    there = {"same": 1, "kv": {"budget": 0.25, "method": "headkv"}, "list": (1, 2), "gone": 3}
    here = {"same": 1, "kv": {"budget": 0.5, "method": "headkv"}, "list": [1, 2], "new": "x"}
    assert differences(there, here) == ["kv.budget 0.25, now 0.5", "gone 3, now not set", 'new not set, now "x"']
