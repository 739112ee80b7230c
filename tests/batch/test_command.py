# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm generate --prompts` in this process, with a small model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_support import contents
from PIL import Image

from headkv_mm import cli
from headkv_mm.batch.files import read_lines
from headkv_mm.commands import batch_memory, compile_kernels

LIST = """\
{"prompt": "red circle top", "seed": 5}
{"id": "zebra", "prompt": "a zebra"}
{"id": "ring", "prompt": "blue ring left on black"}
{"prompt": "green square bottom"
"""


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADKV_MM_KERNELS", "reference")
    monkeypatch.setattr(compile_kernels, "compile_cpu_kernels", lambda dtypes: 0.0)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "list.jsonl").write_text(LIST)
    return str(tmp_path / "list.jsonl")


def generate(model: str, prompts: str, output: Path, *more: str) -> int:
    options = ["--kv-budget", "1/2", "--kv-option", "grouping_rows=2"] if "none" not in more else []
    return cli.main(["generate", "--prompts", prompts, "--model", model, "--output", str(output), *options, *more])


def test_a_list(small_image_model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import headkv_mm

    out = tmp_path / "out"
    assert generate(small_image_model, prompts, out, "--batch-size", "2") == 1
    assert {file.name for file in out.iterdir()} == {
        *("00001.png", "ring.png"),
        *("config.json", "manifest.jsonl", "timings.jsonl", "failed.jsonl"),
    }
    printed = capsys.readouterr()
    assert "2 images in" in printed.out and "1 line could not be read and 1 prompt could not be drawn" in printed.out
    assert "line 4: is no JSON" in printed.err and "line 2 (zebra): unknown word 'zebra'" in printed.err
    first, second = read_lines(out / "manifest.jsonl")
    assert (first["id"], first["seed"], first["read_as"]) == ("00001", 5, "red circle top on white")
    assert (second["id"], second["seed"], second["prompt"]) == ("ring", 0, "blue ring left on black")
    assert 0 < first["kv_bytes"] < first["kv_bytes_full"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["kv_compression"] == {"method": "pointed", "budget": 0.5, "grouping_rows": 2}
    assert config["made_with"]["versions"]["torch"]
    timings = read_lines(out / "timings.jsonl")
    assert sorted(name for timing in timings for name in timing["images"]) == ["00001", "ring"]
    kv: dict[str, Any] = {"kv_compression": "pointed", "kv_budget": 1 / 2, "kv_options": {"grouping_rows": 2}}
    pipe = headkv_mm.pipeline("text-to-image", small_image_model, device="cpu", **kv)
    wanted = pipe("red circle top", seed=5).images[0]
    assert Image.open(out / "00001.png").tobytes() == wanted.tobytes()

    assert generate(small_image_model, prompts, out, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["drawn"]) == (2, 0)
    assert [item["line"] for item in found["failed"]] == [2, 4]
    with open(prompts, "w") as file:
        file.write(LIST.replace("a zebra", "red ring top").replace('bottom"', 'bottom"}'))
    assert generate(small_image_model, prompts, out) == 0
    assert [record["id"] for record in read_lines(out / "manifest.jsonl")] == ["00001", "zebra", "ring", "00004"]
    assert not (out / "failed.jsonl").exists()


def test_classes(tmp_path: Path) -> None:
    import torch

    import headkv_mm
    from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

    codes, classes = 12, 3
    text = {"model_type": "llama", "vocab_size": codes + classes + 1, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = LlamaGenConfig(
        text_config={**text, **heads, **ends},
        conditioning="class",
        num_classes=classes,
        max_prompt_length=1,
        image_height=6,
        image_width=6,
        codebook_size=codes,
        patch_size=2,
    )
    torch.manual_seed(0)
    model = str(tmp_path / "model")
    LlamaGenForConditionalGeneration(config).save_pretrained(model)
    prompts = tmp_path / "list.jsonl"
    prompts.write_text('{"class": 1}\n{"class": 9}\n{"class": 0, "seed": 4, "id": "dog"}\n{"prompt": "a dog"}')
    assert generate(model, str(prompts), tmp_path / "out", "--guidance-scale", "2") == 1
    records = read_lines(tmp_path / "out" / "manifest.jsonl")
    assert [(item["id"], item["class"], item["prompt"]) for item in records] == [("00001", 1, None), ("dog", 0, None)]
    failed = read_lines(tmp_path / "out" / "failed.jsonl")
    assert [item["line"] for item in failed] == [2, 4]
    assert "classes" in failed[1]["error"]
    kv: dict[str, Any] = {"kv_compression": "headkv", "kv_budget": 1 / 2, "kv_options": {"grouping_rows": 2}}
    pipe = headkv_mm.pipeline("text-to-image", model, device="cpu", guidance_scale=2.0, **kv)
    wanted = pipe(class_labels=[0], seed=4)[0].images[0]
    assert Image.open(tmp_path / "out" / "dog.png").tobytes() == wanted.tobytes()


def test_several_images_of_a_prompt_from_standard_input(
    small_image_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red circle top\n\nblue ring left")))
    options = ("--num-images", "2", "--seed", "3", "--kv-compression", "none", "--scale", "2", "--batch-size", "3")
    assert generate(small_image_model, "-", tmp_path / "out", *options) == 0
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == [f"0000{line}-seed{seed}.png" for line in (1, 3) for seed in (3, 4)]
    assert Image.open(tmp_path / "out" / names[0]).size == (24, 24)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare"], "--compare is for single prompts"),
        (["--maps"], "--maps is for single prompts"),
        (["a red ring top"], "give either a PROMPT"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cpu", "--device-map", "auto"], "not allowed with argument"),
        (["--kv-budget", "1/36"], "fewer than one row"),
        (["--kv-compression", "headvk"], "unknown method"),
        (["--kv-budget", "40KiB", "--batch-size", "20"], "40KiB"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--prompts", "/no/such/list.txt"], "No such file or directory: /no/such/list.txt"),
        (["--prompts", "list.csv"], "list.csv: prompts come from"),
        (["--negative-prompt", "red ring top"], "negative_prompt has no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    small_image_model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert generate(small_image_model, prompts, tmp_path / "out", *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(f"headkv-mm: {prompts}")]
    assert line.startswith("headkv-mm: error: ") and message in line
    assert not (tmp_path / "out").exists(), "an error leaves nothing behind"


def test_an_output_that_is_a_file(
    small_image_model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way")
    assert generate(small_image_model, prompts, tmp_path / "out") == 2
    assert f"Not a directory: {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_device_map(small_image_model: str, prompts: str, tmp_path: Path) -> None:
    assert generate(small_image_model, prompts, tmp_path / "plain") == 1
    assert generate(small_image_model, prompts, tmp_path / "spread", "--device-map", "auto") == 1
    assert contents(tmp_path / "spread") == contents(tmp_path / "plain")


def test_another_budget_in_one_folder(
    small_image_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("red circle top")
    generate(small_image_model, str(tmp_path / "list.txt"), tmp_path / "out")
    generate(small_image_model, str(tmp_path / "list.txt"), tmp_path / "out", "--kv-budget", "2/3")
    assert "other settings (kv_compression.budget 0.5, now 0.66" in capsys.readouterr().err


def test_processes_that_accelerate_does_not_see(
    small_image_model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate(small_image_model, prompts, tmp_path / "out")  # this process is now alone for accelerate
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate(small_image_model, prompts, tmp_path / "out2") == 2
    assert "2 processes were started, but accelerate takes them for 1" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert generate(small_image_model, prompts, tmp_path / "out2", "--device-map", "auto") == 2
    assert "start one process per machine" in capsys.readouterr().err


def test_an_interruption(
    small_image_model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "_run", interrupt)
        assert generate(small_image_model, prompts, tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert generate(small_image_model, prompts, tmp_path / "out") == 1


def test_the_batch_follows_the_memory(small_image_model: str) -> None:
    import headkv_mm
    from headkv_mm.batch.prompts import Prompt

    made: dict[str, Any] = {"device": "cpu", "guidance_scale": 2.0}
    pipe = headkv_mm.pipeline("text-to-image", small_image_model, **made)
    prompts = [Prompt(1, "a", prompt="a zebra as long as can be"), Prompt(2, "b", prompt="red ring top")]
    small, large = (batch_memory.batch_that_fits(pipe, prompts, memory) for memory in (2**20, 2**21))
    assert 1 <= small < large
    assert batch_memory.batch_that_fits(pipe, prompts, 2**40) == 256
    assert batch_memory.batch_that_fits(pipe, prompts, None) == batch_memory.WITHOUT_MEMORY
    with pytest.raises(ValueError, match="one image does not fit"):
        batch_memory.batch_that_fits(pipe, prompts, 2**10)


def test_the_bar_counts_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    from headkv_mm.batch.progress import image_bar

    there = iter([2, *[5] * 100])
    with image_bar(lambda: next(there), total=4, show=True):
        pass
    assert "4/4" in capsys.readouterr().err
    with image_bar(lambda: 1 // 0, total=4, show=False):
        pass
