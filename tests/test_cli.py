# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from headkv_mm import cli
from headkv_mm.commands import generate
from headkv_mm.commands.output_folder import OutputFolder

PROMPT = "a red circle top left and a blue square bottom right"
CANONICAL = "red circle top-left, blue square bottom-right on white"


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels that a test runs are compiled."""
    monkeypatch.setattr(generate, "compile_cpu_kernels", lambda dtypes: 0.0)


@pytest.fixture(scope="module")
def small_model(small_image_model: str) -> str:
    """A model folder that draws in a moment."""
    return small_image_model


def _generate(small_model: str, output: Path, *more: str) -> int:
    budget = () if "--kv-budget" in more else ("--kv-budget", "1/2")
    options = ("--kv-option", "grouping_rows=2") if "--kv-compression" not in more else ()
    return cli.main(["generate", PROMPT, "--model", small_model, "--output", str(output), *budget, *options, *more])


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("headkv-mm: error: ")
    return lines[0]


def test_generate_writes_images_and_a_record(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _generate(small_model, tmp_path / "a" / "b", "--num-images", "2", "--seed", "5", "--top-k", "4") == 0
    folder = tmp_path / "a" / "b"
    stem = "00-a-red-circle-top-left-and-a-blue-square"
    assert {file.name for file in folder.iterdir()} == {f"{stem}-seed5.png", f"{stem}-seed6.png", "run.json"}
    record = json.loads((folder / "run.json").read_text())
    assert record["versions"]["torch"]
    assert record["settings"]["seed"] == 5
    assert [(image["seed"], image["read_as"]) for image in record["images"]] == [(5, CANONICAL), (6, CANONICAL)]
    (report,) = record["reports"]
    assert (report["method"], report["budget"], report["options"]) == ("pointed", 0.5, {"grouping_rows": 2})
    assert report["settings"]["top_k"] == 4
    # 12 pixels, enlarged by a whole number to about 512.
    assert Image.open(folder / f"{stem}-seed5.png").size == (504, 504)
    out = capsys.readouterr().out
    assert f"{report['tokens_per_second']:.0f}" in out
    assert str(folder / "run.json") in out.splitlines()


def test_images_are_those_of_the_pipeline(small_model: str, tmp_path: Path) -> None:
    import headkv_mm

    assert _generate(small_model, tmp_path, "--kv-compression", "none", "--scale", "1", "--seed", "3") == 0
    wanted = headkv_mm.pipeline("text-to-image", small_model, device="cpu")(PROMPT, seed=3).images[0]
    (file,) = tmp_path.glob("*-seed3.png")
    assert Image.open(file).tobytes() == wanted.tobytes()


def test_compare_and_maps(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _generate(small_model, tmp_path, "--compare", "--maps", "--num-images", "2") == 0
    names = {file.name.split("blue-square-")[-1] for file in tmp_path.glob("*.png")}
    assert names == {
        *(f"seed{seed}-{kind}.png" for seed in (0, 1) for kind in ("full", "pointed", "compare")),
        "heads.png",
        "seed0-kept.png",
    }
    record = json.loads((tmp_path / "run.json").read_text())
    full, small = record["reports"]
    assert (full["cache"], full["method"], small["method"]) == ("full", "none", "pointed")
    assert full["nbytes"] == small["nbytes_full"] > small["nbytes"]
    out = capsys.readouterr().out
    assert re.search(r"^full cache .*100\.0%", out, re.MULTILINE)
    assert re.search(rf"^pointed 1/2 .*{small['ratio']:.1%}", out, re.MULTILINE)


def test_json_is_the_record(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _generate(small_model, tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-compression", "headvk"], "unknown method 'headvk'.*headkv"),
        (["--kv-compression", "none", "--compare"], "--compare needs a compression"),
        (["--kv-option", "tao=1"], "no option 'tao'"),
        (["--kv-option", "tau"], "write NAME=VALUE"),
        (["--kv-option", "tau=high"], "tau must be a number"),
        (["--kv-budget", "0"], "budget 0 "),
        (["--kv-budget", "-1/2"], "expected one argument|budget '?-"),
        (["--kv-budget", "1.5"], "budget 1.5 is outside"),
        (["--kv-budget", "much"], "'much' is not understood"),
        (["--kv-budget", "1/36"], "fewer than one row"),
        (["--num-images", "0"], "at least 1"),
        (["--num-images", "two"], "not a whole number"),
        (["--seed", "-1"], "at least 0"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--guidance-scale", "0.5"], "guidance_scale must be at least 1"),
        (["--negative-prompt", "red ring top"], "negative_prompt has no effect without guidance"),
        (["--negative-prompt", "a zebra", "--guidance-scale", "2"], "zebra"),
        (["--grid", "16x16"], "draws images of 6x6 tokens and cannot draw 16x16"),
        (["--grid", "16"], "write HEIGHTxWIDTH"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=str,
)
def test_bad_arguments(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _generate(small_model, tmp_path / "out", *arguments) == 2
    assert re.search(message, _error(capsys))
    assert not (tmp_path / "out").exists(), "an error leaves nothing behind"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a zebra on the moon", "unknown words? .*'zebra'.*COLOUR SHAPE PLACE"), ("", "prompt is empty"), (" ", "empty")],
)
def test_bad_prompts(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, message: str
) -> None:
    arguments = ["generate", PROMPT, prompt, "--model", small_model, "--kv-budget", "1/2"]
    assert cli.main([*arguments, "--kv-option", "grouping_rows=2", "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, _error(capsys))
    assert not (tmp_path / "out").exists()


def test_too_many_objects_for_the_prompt(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "red circle top, red circle left, red circle right, red circle bottom"
    assert cli.main(["generate", prompt, "--model", small_model, "--output", str(tmp_path), "--kv-budget", "1/2"]) == 2
    assert re.search("1 to 3 objects, got 4|grouping", _error(capsys))


def test_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate"]) == 2
    assert "PROMPT" in _error(capsys)
    assert cli.main([]) == 2
    assert "COMMAND" in _error(capsys)
    assert cli.main(["paint"]) == 2
    assert "invalid choice: 'paint'" in _error(capsys)


def test_bad_model_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], small_model: str) -> None:
    import shutil

    assert _generate("/no/such/folder", tmp_path / "out") == 2
    assert "/no/such/folder: no such folder" in _error(capsys)
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    (broken / "model.safetensors").write_bytes(b"0" * 50)
    assert _generate(str(broken), tmp_path / "out") == 2
    assert "weights in" in _error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert _generate(small_model, tmp_path / "file" / "out") == 2
    assert f"Not a directory: {tmp_path / 'file' / 'out'}" in _error(capsys)
    assert _generate(small_model, tmp_path / "file") == 2
    assert f"Not a directory: {tmp_path / 'file'}" in _error(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("run.json").write_text("of an earlier run")

    def full(self: OutputFolder, name: str, data: Any) -> None:
        self.new(name).write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / name))

    monkeypatch.setattr(OutputFolder, "write_json", full)
    assert _generate(small_model, tmp_path) == 2
    assert f"No space left on device: {tmp_path / 'run.json'}" in _error(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "of an earlier run"


def test_an_interruption(
    small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_write", interrupt)
    assert _generate(small_model, tmp_path / "out") == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(small_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["--debug", "generate", PROMPT, "--model", "/no/such/folder", "--output", str(tmp_path)])


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.COMMANDS["methods"], "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["methods"])


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert re.search(rf"example:\n  headkv-mm {command}", capsys.readouterr().out)


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from headkv_mm.registry import get_method, methods

    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in found] == methods()
    assert {record["name"]: set(record["options"]) for record in found} == {
        name: set(get_method(name).options) for name in methods()
    }
    assert cli.main(["methods"]) == 0
    assert "tau=0.9" in capsys.readouterr().out


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys, headkv_mm.cli as cli; cli.build_parser(); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib', 'numba') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ctrl_c_in_a_real_process(interruptible_command: list[str], tmp_path: Path) -> None:
    command = [*interruptible_command, "generate", PROMPT, "--kv-compression", "none"]
    process = subprocess.Popen(
        [*command, "--num-images", "500", "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "headkv-mm: interrupted, nothing was written"
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_error() -> None:
    code = "from headkv_mm.cli import main; import sys; sys.exit(main(['methods']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
