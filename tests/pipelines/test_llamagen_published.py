# SPDX-License-Identifier: Apache-2.0
"""LlamaGen with classes and with text features: full budgets, eviction, positions, batches, bytes and bad input."""

from __future__ import annotations

import string
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

import headkv_mm
from headkv_mm import Compression, ImageGrid, cli, plan_memory
from headkv_mm.llamagen.convert import convert_llamagen
from headkv_mm.pipelines.models.llamagen import LlamaGenAdapter

from ..llamagen import published as theirs
from . import adapter_checks as checks

METHODS = ("headkv", "lines", "streaming", "pointed")
KINDS = ("class", "text")
PROMPTS = {"class": ["class 3", "class 0"], "text": ["A", "Long d"]}
LENGTHS = {"class": [1, 1], "text": [3, 8]}
SIDE = 2 * theirs.GRID


def t5_tokenizer() -> T5Tokenizer:
    """Reads "▁" before each word, every character, and "</s>" at the end."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return T5Tokenizer(vocab=[*pieces, *((letter, -2.0) for letter in string.ascii_lowercase)], extra_ids=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted models of both kinds, and a T5 model with its tokenizer."""
    root = tmp_path_factory.mktemp("llamagen")
    torch.save({"model": theirs.tokenizer()}, root / "vq.pt")
    found = {}
    for kind in KINDS:
        torch.save({"model": theirs.transformer(kind, kv_heads=2)}, root / f"{kind}.pt")
        convert_llamagen(root / f"{kind}.pt", root / kind, vq=root / "vq.pt", image_size=SIDE, heads=theirs.HEADS)
        found[kind] = root / kind
    tokenizer = t5_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=theirs.FEATURES,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        initializer_factor=10.0,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    found["t5"] = root / "t5"
    T5ForConditionalGeneration(config).save_pretrained(found["t5"])
    tokenizer.save_pretrained(found["t5"])
    return found


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "class": headkv_mm.pipeline("text-to-image", model=folders["class"]),
        "text": headkv_mm.pipeline("text-to-image", model=folders["text"], text_encoder=folders["t5"]),
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(kind: str, pipes: dict[str, Any]) -> Any:
    return pipes[kind]


@pytest.fixture
def adapter(pipe: Any) -> LlamaGenAdapter:
    found: LlamaGenAdapter = pipe._adapter
    return found


def test_pictures_of_both_kinds(kind: str, pipe: Any, folders: dict[str, Path]) -> None:
    outputs = pipe(PROMPTS[kind], num_images=2, seed=0, batch_size=4)
    assert [output.prompts[0] for output in outputs] == [prompt.lower() for prompt in PROMPTS[kind]]
    assert outputs[0].report.settings["guidance_scale"] == (4.0 if kind == "class" else 7.5)
    for output in outputs:
        assert all(isinstance(image, Image.Image) and image.size == (SIDE, SIDE) for image in output.images)
        assert len(output.images[0].getcolors(SIDE * SIDE)) > 10
    tokens = torch.cat([output.tokens for output in outputs])
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    # The model as an object, with the encoder as an object.
    more = {}
    if kind == "text":
        encoder = T5EncoderModel.from_pretrained(folders["t5"])
        more = {"text_encoder": encoder, "tokenizer": t5_tokenizer()}
    again = headkv_mm.pipeline("text-to-image", model=pipe.model, **more)
    assert torch.equal(again(PROMPTS[kind][0], seed=0).tokens, tokens[:1])


def test_class_labels(pipes: dict[str, Any]) -> None:
    pipe = pipes["class"]
    outputs = pipe(class_labels=[3, 0], seed=1, keep_tokens=True, num_images=2)
    assert [output.prompts for output in outputs] == [["class 3"] * 2, ["class 0"] * 2]
    single = pipe(class_labels=3, seed=1)
    assert torch.equal(single.tokens, outputs[0].tokens[:1])
    assert torch.equal(pipe(class_labels=torch.tensor([3]), seed=1)[0].tokens, single.tokens)
    assert torch.equal(pipe(" Class  3", seed=1).tokens, single.tokens)
    assert pipe.check_class_labels([3]) == ["class 3"]
    wanted = pipe.model.generate(class_labels=[3], seeds=[1])
    assert torch.equal(single.tokens, wanted)


def test_features_take_the_place_of_texts(pipes: dict[str, Any]) -> None:
    pipe = pipes["text"]
    wanted = pipe(PROMPTS["text"], seed=2, batch_size=2)
    padded, mask = pipe._adapter._reader.read(["a", "long d"])
    assert mask.sum(1).tolist() == [3, 8]
    rows = [row[keep.bool()] for row, keep in zip(padded, mask, strict=True)]
    right = torch.stack([torch.cat((rows[0], torch.zeros(5, theirs.FEATURES))), rows[1]])  # as T5 pads
    for features, given in ((padded, mask), (rows, None), (right, mask.flip(1))):
        found = pipe(features=features, feature_mask=given, seed=2, batch_size=2)
        assert [item.prompts for item in found] == [["features 0"], ["features 1"]]
        for one, other in zip(wanted, found, strict=True):
            assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(pipe(features=rows[0], seed=2).tokens, wanted[0].tokens)
    assert torch.equal(pipe(features=padded[0], feature_mask=mask[0], seed=2).tokens, wanted[0].tokens)
    bare = headkv_mm.pipeline("text-to-image", model=pipe.model)
    assert pipe.settings().keys() - bare.settings().keys() == {"text_encoder"}
    assert torch.equal(bare(features=rows[0], seed=2).tokens, wanted[0].tokens)
    with pytest.raises(ValueError, match="pass text_encoder="):
        bare("a")


@pytest.mark.parametrize(("method", "greedy"), [(name, name == "headkv") for name in METHODS])
def test_a_full_budget_changes_nothing(kind: str, pipe: Any, method: str, greedy: bool) -> None:
    settings = {"batch_size": 2, "seed": 3, "do_sample": not greedy}
    full = pipe(PROMPTS[kind], **settings)
    ours = pipe(PROMPTS[kind], kv_compression=method, kv_budget=1.0, **settings)
    for one, other in zip(full, ours, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.images[0].tobytes() == other.images[0].tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_is_a_full_cache_with_the_evicted_masked(
    kind: str, pipe: Any, adapter: LlamaGenAdapter, method: str
) -> None:
    prompts, head = adapter.encode(pipe.check_prompts(PROMPTS[kind])), adapter.model.lm_head
    assert prompts.condition_lengths.tolist() == LENGTHS[kind]
    columns = adapter.model.config.max_prompt_length
    run = checks.watch(adapter, prompts, head, Compression(method, budget=0.25))
    pads = [columns - length for length in LENGTHS[kind]]
    # Without its own features an unconditional row lies under its prompt's mask.
    expected = checks.oracle_scores(adapter, prompts, head, run, pads * 2)
    assert run.scores.shape[:2] == (36, 4)
    assert (run.scores - expected).abs().max() < 1e-4
    full = checks.full_scores(adapter, prompts, head, run)
    for branch in (slice(0, 2), slice(2, 4)):
        assert (run.scores - full)[:, branch].abs().max() > 1e-2


def test_positions_go_on_to_the_last_token(kind: str, pipe: Any, adapter: LlamaGenAdapter) -> None:
    prompts, head = adapter.encode(pipe.check_prompts(PROMPTS[kind])), adapter.model.lm_head
    small = checks.watch(adapter, prompts, head, Compression("headkv", budget=0.25)).trace.positions
    full = checks.watch(adapter, prompts, head).trace.positions
    assert len(small) == len(full) == 36
    assert all(torch.equal(one, other) for one, other in zip(small, full, strict=True))
    # Columns, as published: image token i has P + i, whatever the padding.
    assert small[-1].flatten().tolist() == [adapter.model.config.max_prompt_length + 34]


def test_a_batch_equals_its_prompts_alone(kind: str, pipe: Any) -> None:
    settings = {"seed": 5, "kv_compression": "headkv", "kv_budget": 0.25, "keep_tokens": True}
    together = pipe(PROMPTS[kind], batch_size=2, **settings)
    for prompt, mine in zip(PROMPTS[kind], together, strict=True):
        alone = pipe(prompt, **settings)
        assert torch.equal(alone.tokens, mine.tokens)
        assert alone.images[0].tobytes() == mine.images[0].tobytes()
        for layer, other in zip(alone.kept_tokens[0], mine.kept_tokens[0], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(layer, other, strict=True))
            assert all(0 < len(one) < 36 and one.max() < 36 for one in layer)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_bytes_are_as_planned(kind: str, pipe: Any, guidance: float) -> None:
    out = pipe(PROMPTS[kind][0], kv_compression="headkv", kv_budget=9, guidance_scale=guidance)
    rows, condition = (1 if guidance == 1 else 2), LENGTHS[kind][0]
    plan = plan_memory(pipe.model, "headkv", budget=9, rows=rows, condition=condition)
    per_entry = rows * theirs.LAYERS * 2 * 16 * 2 * 4  # heads, width, K and V, float32
    assert plan.nbytes == per_entry * (condition + 9 + 6)
    assert plan.nbytes < out.report.nbytes <= plan.nbytes + plan.bookkeeping
    full = pipe(PROMPTS[kind][0], guidance_scale=guidance).report
    assert full.nbytes == full.nbytes_full == per_entry * (pipe.model.config.max_prompt_length + 35)


def test_negative_prompts(kind: str, pipe: Any) -> None:
    one, other = PROMPTS[kind]
    plain = pipe(one, do_sample=False).tokens
    assert not torch.equal(plain, pipe(one, negative_prompt=other, do_sample=False).tokens)
    # Led away from itself, a prompt is drawn as without guidance.
    same = pipe(one, negative_prompt=one, do_sample=False).tokens
    assert torch.equal(same, pipe(one, guidance_scale=1, do_sample=False).tokens)


def test_threads_do_not_meet(kind: str, pipe: Any) -> None:
    asked = [("headkv", 0.25), ("lines", 0.5), ("none", None)]
    prompt = PROMPTS[kind][0]
    alone = [pipe(prompt, seed=2, kv_compression=name, kv_budget=budget).tokens for name, budget in asked]
    found: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        name, budget = asked[index]
        found[index] = pipe(prompt, seed=2, kv_compression=name, kv_budget=budget).tokens

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], tokens) for index, tokens in enumerate(alone))


def test_what_cannot_be_drawn(pipes: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    classes, texts = pipes["class"], pipes["text"]
    width = theirs.FEATURES

    def refused(call: Any, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused(lambda: classes("a cat"), "draws classes, not texts: pass class_labels=.*0 to 4")
    refused(lambda: classes("class 5"), "class labels go from 0 to 4, got 5")
    refused(lambda: classes(class_labels=[1, 5]), "class labels go from 0 to 4, got 5")
    refused(lambda: classes(class_labels=-1), "class labels go from 0 to 4, got -1")
    refused(lambda: classes(class_labels=[]), "empty list of class_labels")
    refused(lambda: classes(class_labels=[1.5]), "a class label must be an integer", TypeError)
    refused(lambda: classes(class_labels="1"), "class_labels must be", TypeError)
    refused(classes, "exactly one of prompts, class_labels and features")
    refused(lambda: classes("class 1", class_labels=1), "exactly one of prompts")
    refused(lambda: classes(features=torch.zeros(3, width)), "reads no text features")
    refused(lambda: classes("class 1", image_grid=ImageGrid(4, 6)), "draws images of 6x6 tokens and cannot draw 4x6")
    refused(lambda: texts(class_labels=1), "draws texts, not classes")
    refused(lambda: texts("abcdefg"), "the prompt has 9 tokens, this model reads at most 8")
    refused(lambda: texts(features=torch.zeros(1, 3, 5)), r"must have shape \[1 to 8, 12\].* got \(3, 5\)")
    refused(lambda: texts(features=torch.zeros(9, width)), r"got \(9, 12\)")
    refused(lambda: texts(features=torch.zeros(1, 3, width), feature_mask=torch.zeros(1, 3)), r"got \(0, 12\)")
    refused(lambda: texts(features=torch.zeros(1, 3, width), feature_mask=torch.zeros(2, 3)), "feature_mask must be")
    refused(lambda: texts("a", feature_mask=torch.ones(1, 3)), "feature_mask has no effect without features")
    refused(lambda: texts(features="cat"), "features must be a tensor", TypeError)
    build = headkv_mm.pipeline
    refused(lambda: build("text-to-image", model=classes.model, text_encoder=folders["t5"]), "without a text encoder")
    refused(lambda: build("text-to-image", model=texts.model, text_encoder=tmp_path), "has no config.json")
    refused(lambda: build("text-to-image", model=texts.model, text_encoder=folders["class"]), "must be a T5 model")
    encoder = T5EncoderModel.from_pretrained(folders["t5"])
    refused(lambda: build("text-to-image", model=texts.model, text_encoder=encoder), "pass tokenizer= too")
    refused(lambda: build("text-to-image", model=texts.model, text_encoder=3), "folder or a T5 model", TypeError)
    encoder.config.d_model = 13
    refused(
        lambda: build("text-to-image", model=texts.model, text_encoder=encoder, tokenizer=t5_tokenizer()),
        "reads text features of width 12, the text encoder gives 13",
    )


def test_a_model_without_a_decoder_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save(theirs.transformer("class"), tmp_path / "c.pt")
    convert_llamagen(tmp_path / "c.pt", tmp_path / "out", image_size=96, heads=theirs.HEADS)
    with pytest.raises(ValueError, match="no image decoder: convert it again with --vq"):
        headkv_mm.pipeline("text-to-image", model=tmp_path / "out")


def test_from_the_command_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--kv-compression", "none", "--no-progress", "--json"]
    output = ["--output", str(tmp_path / "out")]
    classes = ["generate", "--model", str(folders["class"]), "--class-labels"]
    assert cli.main([*classes, "3,0", *output, *common]) == 0
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == ["00-class-3-seed0.png", "01-class-0-seed0.png"]
    texts = ["generate", "a", "--model", str(folders["text"]), "--text-encoder", str(folders["t5"])]
    assert cli.main([*texts, *output, *common]) == 0
    assert (tmp_path / "out" / "00-a-seed0.png").is_file()
    capsys.readouterr()
    assert cli.main([*classes, "3,x", *output, *common]) == 2
    assert "write whole numbers, such as 207,360" in capsys.readouterr().err
    assert cli.main([*classes, "9", *output, *common]) == 2
    assert "class labels go from 0 to 4, got 9" in capsys.readouterr().err
    assert cli.main([*texts, "--class-labels", "1", *output]) == 2
    assert "give either a PROMPT" in capsys.readouterr().err
