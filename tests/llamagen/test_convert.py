# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints, converted: against the formulas, through files, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM

from headkv_mm import cli
from headkv_mm.llamagen.convert import convert_llamagen

from . import published as theirs

SCALE = 3.0
SIDE = theirs.GRID * 2  # the decoder doubles once
KINDS = ["class", "text"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both kinds and of the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        torch.save({"model": theirs.transformer(kind)}, folder / f"{kind}.pt")
    torch.save({"model": theirs.tokenizer()}, folder / "vq.pt")
    return folder


@pytest.fixture(scope="module")
def models(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both kinds, converted and loaded the stock way."""
    loaded = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("converted") / kind
        _convert(files / f"{kind}.pt", folder, vq=files / "vq.pt")
        loaded[kind] = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    return loaded


def _convert(checkpoint: Path, folder: Path, **more: Any) -> Any:
    size = None if "image_size" in more else SIDE if more.get("vq") else 16 * theirs.GRID
    return convert_llamagen(checkpoint, folder, **{"image_size": size, "heads": theirs.HEADS, **more})


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    """Features [2, P, C] of captions of 3 and 8 tokens, and their mask, padded on the left."""
    features = torch.randn(2, theirs.CAPTION, theirs.FEATURES, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, theirs.CAPTION, dtype=torch.long)
    mask[0, :5] = 0
    return features * mask[..., None], mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scores_equal_the_formulas(kind: str, kv_heads: int, tmp_path: Path) -> None:
    weights = theirs.transformer(kind, kv_heads)
    save_file(weights, tmp_path / "c.safetensors")
    done = _convert(tmp_path / "c.safetensors", tmp_path / "out")
    assert (done.kind, done.kv_heads, done.grid, done.pixels) == (kind, kv_heads, theirs.GRID, None)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    codes = torch.randint(theirs.CODES, (2, 35), generator=torch.Generator().manual_seed(2))
    embed = model.get_input_embeddings()
    if kind == "class":
        valid = torch.ones(2, 1, dtype=torch.long)
        wanted = theirs.logits(weights, theirs.class_condition(weights, [4, 0]), codes)
        condition = embed(torch.tensor([[theirs.CODES + 4], [theirs.CODES]]))
    else:
        features, valid = _features()
        wanted = theirs.logits(weights, theirs.text_condition(weights, features), codes, valid)
        condition = model.text_projection(features)
    with torch.no_grad():
        found = model(
            inputs_embeds=torch.cat((condition, embed(codes)), dim=1),
            attention_mask=torch.cat((valid, torch.ones_like(codes)), dim=1),
        ).logits[:, valid.shape[1] - 1 :]
    assert wanted.std() > 1
    assert (found - wanted).abs().max() < 1e-4


def test_guided_classes_are_drawn_as_by_the_formulas(models: dict[str, Any]) -> None:
    weights = theirs.transformer("class")
    condition = theirs.class_condition(weights, [1, 3])
    null = theirs.class_condition(weights, [theirs.CLASSES, theirs.CLASSES])
    wanted = theirs.greedy(weights, condition, null, SCALE)
    found = models["class"].generate(class_labels=[1, 3], do_sample=False, guidance_scale=SCALE)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_guided_texts_are_drawn_as_by_the_formulas(models: dict[str, Any]) -> None:
    weights = theirs.transformer("text")
    features, valid = _features()
    null = theirs.text_condition(weights, weights["cls_embedding.uncond_embedding"][None]).expand(2, -1, -1)
    wanted = theirs.greedy(weights, theirs.text_condition(weights, features), null, SCALE, valid)
    found = models["text"].generate(text_features=features, attention_mask=valid, do_sample=False, guidance_scale=SCALE)
    assert torch.equal(found, wanted)
    assert not torch.equal(found[0], found[1])


def test_pictures_equal_the_formulas(models: dict[str, Any]) -> None:
    codes = torch.randint(theirs.CODES, (2, 36), generator=torch.Generator().manual_seed(4))
    wanted = theirs.pictures(theirs.tokenizer(), codes)  # [2, 3, 12, 12]
    model = models["class"]
    with torch.no_grad():
        assert (model.vq_model.decode(codes) - wanted).abs().max() < 1e-4
    shown = model.decode_image_tokens(codes)
    assert shown.shape == (2, SIDE, SIDE, 3)
    assert shown.dtype == torch.uint8
    expected = ((wanted.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert (shown.float() - expected).abs().max() <= 0.51
    assert shown.float().std() > 20
    assert torch.equal(model.decode_image_tokens(codes[1:])[0], shown[1])


@pytest.mark.parametrize("layout", ["plain", "ema", "state_dict", "module.", "safetensors", "old"])
def test_layouts(layout: str, tmp_path: Path, models: dict[str, Any]) -> None:
    weights = theirs.transformer("class")
    path = tmp_path / "c2i_B_256.pt"
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(weights, path)
    elif layout == "module.":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}, "steps": 3}, path)
    elif layout == "old":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(weights if layout == "plain" else {layout: weights, "epoch": 1}, path)
    assert _convert(path, tmp_path / "out", image_size=None).grid == 16  # from the name
    found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in models["class"].state_dict().items():
        assert name.startswith("vq_model.") or torch.equal(found[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_the_published_settings(kind: str, models: dict[str, Any]) -> None:
    settings = models[kind].generation_config
    wanted = (4.0, 2000) if kind == "class" else (7.5, 1000)
    assert (settings.guidance_scale, settings.top_k) == wanted
    config = models[kind].config
    assert config.conditioning == kind
    assert config.max_prompt_length == (1 if kind == "class" else theirs.CAPTION)
    assert config.vq_config.num_patches == theirs.GRID


def test_half_precision_leaves_the_decoder_alone(files: Path, tmp_path: Path) -> None:
    done = _convert(files / "class.pt", tmp_path / "out", vq=files / "vq.pt", dtype=torch.bfloat16)
    assert done.dtype == "bfloat16"
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.lm_head.weight.dtype == model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.vq_model.parameters()} == {torch.float32}
    tokens = model.generate(class_labels=[1], seeds=[0])
    assert model.decode_image_tokens(tokens).shape == (1, SIDE, SIDE, 3)


def test_a_table_of_angles_gives_the_size_and_is_checked(tmp_path: Path) -> None:
    weights = {**theirs.transformer("class"), "freqs_cis": theirs.angles(1)}
    torch.save(weights, tmp_path / "c.pt")
    assert _convert(tmp_path / "c.pt", tmp_path / "out", image_size=None).grid == theirs.GRID
    with pytest.raises(ValueError, match=r"32 is 2x2 tokens, but .* draws 6x6"):
        _convert(tmp_path / "c.pt", tmp_path / "other", image_size=32)
    torch.save({**weights, "freqs_cis": theirs.angles(1, theta=500.0)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not LlamaGen's"):
        _convert(tmp_path / "c.pt", tmp_path / "other", image_size=None)


class _Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_code_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "c.pt"
    content = {"model": theirs.transformer("class"), "args": _Trap(sprung)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"c\.pt") as caught:
        _convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "refused" in str(caught.value)
    assert not sprung.exists()
    assert not (tmp_path / "out").exists()


def test_every_tensor_needs_a_place(files: Path, tmp_path: Path) -> None:
    def refused(message: str, weights: dict[str, torch.Tensor] | None = None, **more: Any) -> None:
        torch.save(theirs.transformer("class") if weights is None else weights, tmp_path / "c.pt")
        with pytest.raises(ValueError, match=message) as caught:
            _convert(tmp_path / "c.pt", tmp_path / "out", **more)
        assert "\n" not in str(caught.value)
        assert sorted(item.name for item in tmp_path.iterdir() if item.name != "vq.pt") == ["c.pt"]

    weights = theirs.transformer("class")
    refused(r"layers\.0\.extra", {**weights, "layers.0.extra": torch.zeros(1)})
    refused("no tensor layers.1.ffn_norm.weight", {k: v for k, v in weights.items() if k != "layers.1.ffn_norm.weight"})
    refused("neither cls_embedding", {"tok_embeddings.weight": torch.zeros(2, 2)})
    refused("holds no weights", {})
    refused(r"output.weight|lm_head.weight has shape", {**weights, "output.weight": torch.zeros(3, theirs.WIDTH)})
    refused("class-conditional checkpoint, not a text", kind="text")
    refused("no published LlamaGen model has width 64: say how many heads", heads=None)
    refused("check --heads", heads=3)
    refused("give --image-size", image_size=None)
    refused("multiple of 16", image_size=40)
    vq = tmp_path / "vq.pt"
    torch.save({**theirs.tokenizer(), "decoder.extra.weight": torch.zeros(2)}, vq)
    refused("vq_model.decoder.extra.weight has no place", vq=vq)
    torch.save(theirs.tokenizer(codes=30), vq)
    refused("num_embeddings .30. must be codebook_size .24.", vq=vq)
    torch.save(weights, vq)
    refused("no tensor quantize.embedding.weight", vq=vq)


def test_damaged_files_and_taken_folders(files: Path, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes((files / "class.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"no readable torch checkpoint|refused"):
        _convert(tmp_path / "c.pt", tmp_path / "out")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        _convert(tmp_path / "c.safetensors", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        _convert(tmp_path / "missing.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="not an empty folder"):
        _convert(files / "class.pt", files)


def test_from_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["convert", "llamagen", str(files / "text.pt"), "--vq", str(files / "vq.pt"), "--image-size", str(SIDE)]
    assert cli.main([*common, "--heads", "4", "--output", str(tmp_path / "a"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["pixels"], said["left_out"]) == ("text", SIDE, ["quantize.codebook_used"])
    assert cli.main([*common, "--heads", "4", "--output", str(tmp_path / "b"), "--dtype", "float16"]) == 0
    assert "text-conditional LlamaGen: 2 layers of width 64, 4 heads, 6x6 image tokens" in capsys.readouterr().out
    assert cli.main([*common, "--output", str(tmp_path / "c")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "say how many heads it has with --heads" in captured.err
