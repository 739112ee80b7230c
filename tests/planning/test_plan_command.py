# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm plan`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headkv_mm.cli import main
from headkv_mm.demo import image_model_path, text_model_path
from headkv_mm.shapes import get_shape, shapes


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_list_names_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shapes())
    assert all(("not all confirmed" in line) == bool(get_shape(line.split()[0]).unconfirmed) for line in lines)
    assert main(["plan", "--list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(shapes())


def test_table_of_an_image_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llamagen-xl-384", "--memory", "24GiB", "--batch", "200"]) == 0
    out = capsys.readouterr().out
    assert "36 layers, 20 KV heads of 64, bfloat16; 24 x 24 tokens, 2 rows per image (guidance)" in out
    assert "200 images fit with pointed and a budget of at most" in out
    record = planned(capsys, "--model", "llamagen-xl-384", "--memory", "24GiB", "--batch", "200")
    full, *compressed = record["methods"]
    # Two rows of one class token and 576 image tokens: keys and values of 36 layers, 20 heads of 64, 2 bytes each.
    assert full["needed"]["cache_full"] == 400 * 577 * 2 * 36 * 20 * 64 * 2
    assert not full["fits"]
    assert [row["budget"] for row in compressed] == ["1/4", "1/6", "1/8"]
    assert full["largest_batch"] < compressed[0]["largest_batch"] < compressed[2]["largest_batch"]
    assert record["budget_that_fits_share"] == pytest.approx(record["budget_that_fits"] / 576)


def test_without_guidance_twice_as_many_fit(capsys: pytest.CaptureFixture[str]) -> None:
    said = ("--model", "llamagen-l-256", "--memory", "16GB", "--kv-compression", "lines", "--kv-budget", "1/6")
    guided = planned(capsys, *said)["methods"][1]["largest_batch"]
    assert planned(capsys, *said, "--no-guidance")["methods"][1]["largest_batch"] in (2 * guided, 2 * guided + 1)


def test_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    said = ("--model", "qwen3-0.6b", "--memory", "16GiB", "--tokens", "8000", "--dtype", "float16")
    record = planned(capsys, *said, "--kv-compression", "snapkv", "--kv-budget", "0.1", "--batch", "2")
    assert record["dtype"] == "float16"
    assert record["tokens"] == 8000
    assert record["methods"][0]["needed"]["cache"] == 2 * 8000 * 2 * 28 * 8 * 128 * 2
    assert record["budget_that_fits"] == 1.0
    assert main(["plan", *said]) == 0
    assert "8000 tokens per text" in capsys.readouterr().out


def test_it_says_where_compression_does_not_pay(capsys: pytest.CaptureFixture[str]) -> None:
    notes = planned(capsys, "--model", "glm-image", "--memory", "24GiB")["notes"]
    assert any("saves little" in note for note in notes)
    notes = planned(capsys, "--model", "lumina-mgpt-1024", "--memory", "80GB", "--batch", "8")["notes"]
    assert not any("saves little" in note for note in notes)
    assert any("not confirmed" in note for note in notes)


def test_folders_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    record = planned(capsys, "--model", str(image_model_path()), "--memory", "1GiB")
    assert record["image_grid"]["height"] == 16
    assert record["guided"]
    same = planned(capsys, "--model", str(image_model_path() / "config.json"), "--memory", "1GiB")
    assert same["methods"] == record["methods"]
    record = planned(capsys, "--model", str(text_model_path()), "--memory", "1GiB", "--tokens", "500")
    assert record["image_grid"] is None


def test_a_diffusers_folder_is_planned_by_its_autoregressive_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    get_shape("glm-image").config(layers=2).save_pretrained(tmp_path / "vision_language_encoder")
    record = planned(capsys, "--model", str(tmp_path), "--memory", "20GiB", "--grid", "48x32")
    assert (record["layers"], record["kv_heads"], record["guided"]) == (2, 2, False)
    assert record["image_grid"] == {"height": 48, "width": 32, "row_stride": 32, "start": 256}


def test_another_size_keeps_its_newlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_shape("lumina-mgpt-768").config(layers=1).save_pretrained(tmp_path)
    record = planned(capsys, "--model", str(tmp_path), "--memory", "20GiB")
    assert record["image_grid"]["row_stride"] == 49
    assert any("is assumed" in note for note in record["notes"])
    record = planned(capsys, "--model", str(tmp_path), "--memory", "20GiB", "--grid", "32x32")
    assert record["image_grid"]["row_stride"] == 33
    assert not any("is assumed" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nothing", "--memory", "1GiB"], "no file, folder or shape 'nothing'; see headkv-mm plan --list"),
        (["--model", "qwen3-8b", "--memory", "1GiB"], "is a language model: say how long a text is with --tokens N"),
        (["--model", "qwen3-8b"], "plan needs --model and --memory"),
        (["--model", "qwen3-8b", "--memory", "lots"], "'lots' is not understood: write bytes such as 24GiB"),
        (["--model", "qwen3-8b", "--memory", "0B"], "write bytes such as 24GiB"),
        (["--model", "emu3", "--memory", "1GiB", "--dtype", "int8"], "dtype 'int8' is not understood"),
        (["--model", "emu3", "--memory", "1GiB", "--kv-compression", "no"], "unknown method 'no'"),
        (["--model", "emu3", "--memory", "1GiB", "--kv-budget", "4"], "fewer than one row"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_folders_that_hold_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (None, "holds no config.json"),
        ("{", "no configuration could be read"),
        ("{}", "read from"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert main(["plan", "--model", str(tmp_path), "--memory", "1GiB"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
