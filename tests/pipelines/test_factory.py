# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import headkv_mm
from headkv_mm.pipelines.loading import load_image_model
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

PROMPT = "red circle top on white"


def test_from_a_folder(tiny_folder: Path, pipe: TextToImagePipeline) -> None:
    for folder in (tiny_folder, str(tiny_folder)):
        ours = headkv_mm.pipeline("text-to-image", folder, kv_compression="headkv", kv_budget=1 / 2, device="cpu")
        assert isinstance(ours, TextToImagePipeline)
        assert ours(PROMPT, seed=0).report.budget == 1 / 2
    assert torch.equal(ours(PROMPT, seed=0, kv_compression=None).tokens, pipe(PROMPT, seed=0).tokens)


def test_the_embedded_model_is_the_default(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headkv_mm.demo.image_model_path", lambda: tiny_folder)
    assert headkv_mm.pipeline("text-to-image", device="cpu").model.name_or_path == str(tiny_folder)


def test_half_precision_weights_are_widened_on_the_cpu(tiny_model: Any, tmp_path: Path) -> None:
    headkv_mm.pipeline("text-to-image", tiny_model, device="cpu").save_pretrained(tmp_path)
    weights = {name: _half(value) for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _edit_config(tmp_path, dtype="float16")
    assert headkv_mm.pipeline("text-to-image", tmp_path, device="cpu").model.dtype == torch.float32
    asked = headkv_mm.pipeline("text-to-image", tmp_path, device="cpu", dtype=torch.float16)
    assert asked.model.dtype == torch.float16
    assert asked(PROMPT, seed=0, kv_compression="headkv", kv_budget=0.5).report.nbytes > 0


def test_other_tasks_go_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(transformers, "pipeline", lambda *args, **kwargs: calls.append((args, kwargs)))
    headkv_mm.pipeline("fill-mask", "folder", device="cpu")
    assert calls == [(("fill-mask", "folder"), {"device": "cpu"})]


@pytest.mark.parametrize("settings", [{"kv_compression": "headkv"}, {"kv_budget": 0.5}, {"kv_options": {"tau": 0.5}}])
def test_compression_is_refused_where_it_would_be_ignored(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not served for the task 'fill-mask'.*text-to-image"):
        headkv_mm.pipeline("fill-mask", **settings)


def test_bad_compression_is_found_before_loading() -> None:
    with pytest.raises(ValueError, match="unknown method 'headvk'"):
        headkv_mm.pipeline("text-to-image", "/no/such/folder", kv_compression="headvk")


def test_a_model_must_be_a_model() -> None:
    with pytest.raises(TypeError, match="model must be a folder, a name or a transformers model, got Linear"):
        headkv_mm.pipeline("text-to-image", torch.nn.Linear(1, 1))


def test_a_model_without_an_adapter() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10, n_positions=8)
    with pytest.raises(ValueError, match=r"no adapter .* 'gpt2'.*LlamaGen"):
        headkv_mm.pipeline("text-to-image", transformers.GPT2LMHeadModel(config), device="cpu")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _refused(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_image_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _refused(folder, "weights in .* cannot be read")


def test_weights_that_are_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)
    _refused(folder, "weights in .* cannot be read")


def test_missing_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _refused(folder, r"1 tensors? .*missing.*lm_head\.weight")


def test_foreign_weights(folder: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
    _refused(folder, "missing .* and 1 belong to another model")


def test_weights_of_another_size(folder: Path) -> None:
    _edit_config(folder, image_height=8, image_width=8, codebook_size=31)
    _refused(folder, "weights in ")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, "no file named model.safetensors")


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    _refused(folder, "configuration|JSON")


def test_a_grid_that_makes_no_sense(folder: Path) -> None:
    _edit_config(folder, image_height=0)
    _refused(folder, "image_height must be at least 1")


def test_another_architecture(folder: Path) -> None:
    _edit_config(folder, model_type="gpt2")
    with pytest.raises(ValueError, match="no adapter"):
        load_image_model(folder)


def test_not_a_model_folder(tmp_path: Path) -> None:
    _refused(tmp_path, "has no config.json")
    (tmp_path / "model_index.json").write_text("{}")
    _refused(tmp_path, "diffusers folder")
    _refused(tmp_path / "model_index.json", "is a file")


def test_no_such_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    _refused(Path("/no/such/folder"), "no such folder")
