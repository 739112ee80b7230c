# SPDX-License-Identifier: Apache-2.0
"""What trains the embedded image model: data, loss, optimiser, checkpoints, export."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoTokenizer

from headkv_mm.demo import image_export
from headkv_mm.demo.captions import scene_from_caption
from headkv_mm.demo.checkpoint import load_checkpoint, save_checkpoint
from headkv_mm.demo.image_export import export_model
from headkv_mm.demo.image_model import build_untrained_model, word_ids
from headkv_mm.demo.image_training import batch_loss, forgetful_mask, learning_rate_factor, training_batches
from headkv_mm.demo.muon import Muon, orthogonalise
from headkv_mm.demo.parsing import parse_image
from headkv_mm.demo.patches import tokens_to_image
from headkv_mm.demo.scenes import held_out
from headkv_mm.llamagen import register

EVALUATION = {
    "chosen": {"temperature": 0.7, "top_k": 50, "guidance_scale": 1.5},
    "report": {"captions": 4, "results": [{"temperature": 0.7, "top_k": 50, "guidance_scale": 1.5, "all_right": 0.25}]},
    "selection": {"captions": 2, "results": []},
}
TRAINING = {
    "images": 1000,
    "step": 10,
    "seconds": 60.0,
    "seed": 0,
    "processes": 2,
    "forgetful_images": 4,
    "device": "cpu",
}


def test_batches_are_reproducible_and_hold_no_unseen_caption() -> None:
    words = {number: word for word, number in word_ids().items()}
    batches = training_batches(3, 200)
    again = training_batches(3, 200)
    assert sum(len(batch.images) for batch in batches) == 200
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))
    without = 0
    for batch in batches:
        assert batch.prompts.shape[1] in (3, 7, 11, 15)
        for prompt, image in zip(batch.prompts.tolist(), batch.images, strict=True):
            text = " ".join(words[number] for number in prompt[1:-1])
            if not batch.with_caption:
                assert text == "<null>"
                without += 1
                continue
            scene = scene_from_caption(text)
            assert not held_out(scene)
            parsed = parse_image(tokens_to_image(image.numpy()))
            assert set(parsed.objects) == {item.place for item in scene.objects}
            assert parsed.background == scene.background
    assert 4 < without < 34


def test_the_loss_matches_the_padded_prompt() -> None:
    model = build_untrained_model(0).eval()
    for batch in training_batches(1, 6):
        padding = model.config.max_prompt_length - batch.prompts.shape[1]
        pads = torch.full((len(batch.prompts), padding), model.config.pad_token_id)
        ids = torch.cat((pads, batch.prompts, batch.images), dim=1)
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        labels = ids.clone()
        labels[:, : model.config.max_prompt_length] = -100
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            torch.testing.assert_close(batch_loss(model, batch), expected)


def test_learning_rate() -> None:
    assert learning_rate_factor(0, 0, 1000) == pytest.approx(0.02)
    assert learning_rate_factor(100, 499, 1000) == 1.0
    assert learning_rate_factor(100, 750, 1000) == pytest.approx(0.5)
    assert learning_rate_factor(100, 1000, 1000) == pytest.approx(0.02)
    assert learning_rate_factor(100, 1000, 1000, 400) == pytest.approx(0.4)
    assert learning_rate_factor(100, 1200, 1000, 400) == pytest.approx(0.2)
    assert learning_rate_factor(100, 1399, 1000, 400) == pytest.approx(0.008)


def test_the_forgetful_mask_is_causal_and_spares_prompt_and_window() -> None:
    batch = max(training_batches(0, 64), key=lambda item: len(item.images))
    length = batch.prompts.shape[1]
    mask = forgetful_mask(batch, 4, torch.Generator().manual_seed(0))
    total = length + 255
    assert mask.shape == (len(batch.images), 4, total, total)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    assert not (mask & ~causal).any()
    assert mask[:, :, :, :length].eq(causal[:, :length]).all()
    near = causal & ~causal.tril(-18)  # one row and two tokens
    assert mask[:, :, near].all()
    # What is lost stays lost: a column that turns False stays so for every later query.
    for column in range(length, total):
        seen = mask[:, :, column:, column].int()
        assert (seen.diff(dim=-1) <= 0).all()
    kept = mask[:, :, -1].float().mean(-1)
    assert kept.min() < 0.5
    assert kept.max() == 1.0


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    in_place = left.mT @ result @ right.mT  # the singular vectors stay
    assert (in_place - torch.diag_embed(in_place.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_muon_equals_one_matrix_at_a_time() -> None:
    torch.manual_seed(0)
    together: list[torch.nn.Parameter] = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (6, 4), (4, 4))]
    alone = [torch.nn.Parameter(item.detach().clone()) for item in together]
    optimizer, averages = Muon(together, lr=0.1), [torch.zeros_like(item) for item in alone]
    for _ in range(3):
        for index, item in enumerate(alone):
            gradient = torch.randn_like(item)
            together[index].grad = gradient.clone()
            averages[index] = 0.95 * averages[index] + 0.05 * gradient
            update = orthogonalise((0.05 * gradient + 0.95 * averages[index])[None])[0]
            item.data -= 0.1 * max(1.0, item.shape[0] / item.shape[1]) ** 0.5 * update
        optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_muon_refuses_vectors_and_bad_settings() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="lr > 0"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))], lr=0.0)


def _optimizers(model: torch.nn.Linear) -> dict[str, torch.optim.Optimizer]:
    return {"muon": Muon([model.weight]), "adam": torch.optim.AdamW([model.bias])}


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    def steps(model: torch.nn.Linear, optimizers: dict[str, torch.optim.Optimizer], first: int) -> None:
        for step in range(first, first + 3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()

    straight = torch.nn.Linear(4, 4)
    optimizers = _optimizers(straight)
    steps(straight, optimizers, 0)
    save_checkpoint(tmp_path / "run" / "c.safetensors", straight, optimizers, {"step": 3})
    steps(straight, optimizers, 3)
    resumed = torch.nn.Linear(4, 4)
    optimizers = _optimizers(resumed)
    assert load_checkpoint(tmp_path / "run" / "c.safetensors", resumed, optimizers) == {"step": 3}
    steps(resumed, optimizers, 3)
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(straight.bias, resumed.bias)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_checkpoint(tmp_path / "run" / "c.safetensors", torch.nn.Linear(3, 3), {})


def test_export(tmp_path: Path) -> None:
    register()
    folder = tmp_path / "model"
    model = build_untrained_model(1)
    export_model(model, folder, EVALUATION, TRAINING)
    export_model(model, folder, EVALUATION, TRAINING)  # replaces the first
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    loaded = AutoModelForMultimodalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.top_k == 50
    assert loaded.generation_config.guidance_scale == 1.5
    assert loaded.generation_config.do_sample
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())
    assert torch.equal(loaded.patch_decoder.codebook, model.patch_decoder.codebook)  # type: ignore[union-attr]
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 15
    assert "| 0.7 | 50 | 1.5 | 25.0 % |" in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["training"] == TRAINING


def _script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "train_demo_image.py"
    spec = importlib.util.spec_from_file_location("train_demo_image", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_script_trains_resumes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, folder = _script(), tmp_path / "model"
    # Each setting is a whole image, and the threads of the process are those of the other tests.
    monkeypatch.setattr(image_export, "CANDIDATES", image_export.CANDIDATES[:2])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    command = ["train", "--output", str(folder), "--processes", "1", "--batch-size", "4", "--evaluation-captions", "2"]
    command += ["--forgetful-images", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--images", "8", "--peek-images", "1000"])
    script.main()
    first = load_file(folder / "model.safetensors")["lm_head.weight"]
    monkeypatch.setattr(sys, "argv", [*command, "--images", "12", "--peek-images", "1000", "--resume"])
    script.main()
    assert not torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], first)
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["training"]["images"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images must be at least 1"),
        (["--batch-size", "5"], "multiple of --processes"),
        (["--device", "cuda"], "--processes 1 with a GPU"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_bad_arguments_of_the_script(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "model"), *arguments])
    with pytest.raises(SystemExit):
        _script().parse_arguments()
    assert message in capsys.readouterr().err
