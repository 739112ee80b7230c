# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm import cli, demo
from headkv_mm.calibration import NeedlePrompt, procedure
from headkv_mm.commands import heads_online
from headkv_mm.demo.text_tokenizer import build_text_tokenizer
from headkv_mm.head_tables import HeadTable, check_head_table, head_table_for, load_head_table
from headkv_mm.plots_heads import head_table_map

FEW = ("--examples", "3", "--length", "80", "--max-new-tokens", "4")


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the kernels would take longer than all that runs here."""
    monkeypatch.setattr(heads_online, "compile_cpu_kernels", lambda dtypes: 0.0)
    monkeypatch.setenv("HEADKV_MM_KERNELS", "reference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random language model that knows the words of the generated documents."""
    tokenizer = build_text_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=400,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def _all_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers nothing; its attention is as good as any."""
    monkeypatch.setattr(NeedlePrompt, "is_right", lambda self, answer: True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("_all_right")
def test_measuring_writes_a_table_and_a_picture(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "heads.json"
    assert cli.main(["heads", model, *FEW, "--output", str(path)]) == 0
    table = head_table_for(LlamaForCausalLM.from_pretrained(model), path)
    assert (table.layers, table.query_heads, table.kv_heads, table.examples, table.answered) == (2, 4, 2, 3, 3)
    assert table.settings["length"] == 80
    assert names(path.parent) == {"heads.json", "heads.png"}
    assert Image.open(path.with_suffix(".png")).width > 300
    output = capsys.readouterr().out
    assert "3 of 3 prompts were answered right and count" in output
    shares = [f"{float(score):.1%}" for score in table.kv_scores().sum(-1)]
    assert all(share in output for share in shares)
    assert output.splitlines()[-2:] == [str(path), str(path.with_suffix(".png"))]
    assert cli.main(["heads", model, *FEW, "--output", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    assert load_head_table(path) == table, "the same command gives the same table"


@pytest.mark.usefixtures("_all_right")
def test_the_length_is_what_the_model_has_room_for(model: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    assert cli.main(["heads", model, "--examples", "1", "--output", str(path)]) == 0
    assert load_head_table(path).settings["length"] == 350


def test_a_model_that_answers_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["heads", model, *FEW, "--output", str(tmp_path / "heads.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("headkv-mm: error: none of the 3 prompts was answered right")
    assert error.count("\n") == 1
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("_all_right")
def test_an_interrupted_run_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = tmp_path / "whole.json", tmp_path / "heads.json"
    assert cli.main(["heads", model, *FEW, "--output", str(whole)]) == 0
    tried: list[int] = []
    real = procedure.needle_prompt

    def stop_at_the_third(*args: Any) -> NeedlePrompt:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(1)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(procedure, "needle_prompt", stop_at_the_third)
        assert cli.main(["heads", model, *FEW, "--output", str(path)]) == 130
    partial = tmp_path / ".heads.json.partial"
    assert f"interrupted; {partial} keeps what is done" in capsys.readouterr().err
    assert names(tmp_path) == {"whole.json", "whole.png", partial.name}
    other = ["heads", model, *FEW, "--seed", "1", "--output", str(path)]
    assert cli.main(other) == 2
    assert "begun with other settings (seed 0)" in capsys.readouterr().err
    monkeypatch.setattr(procedure, "needle_prompt", lambda *args: tried.append(1) or real(*args))
    assert cli.main(["heads", model, *FEW, "--output", str(path)]) == 0
    assert len(tried) == 3
    assert path.read_text() == whole.read_text()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "heads.txt"], "must be the name of a .json file"),
        (["--output", "{folder}"], "is a folder: name a file in it"),
        (["--output", "x.json", "--prompt", "a b"], "--prompt is for looking at one text: add --online"),
        (["--output", "x.json", "--kv-budget", "1/2"], "--kv-budget is for looking at one text"),
        (["--output", "x.json", "--online", "--examples", "3", "--seed", "0"], "--examples, --seed is for measuring"),
        (["--output", "x.json", "--online", "--document", "a", "--prompt", "b"], "not allowed with argument"),
        (["--output", "x.json", "--examples", "0"], "must be at least 1"),
        (["--output", "x.json", "--length", "351"], "made for 400 positions"),
        (["--output", "x.json", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--output", "x.json", "--online", "--prompt", " "], "text"),
        (["--output", "x.json", "--online", "--prompt", "the code"], "fits the budget, so no head was given a type"),
        (["--output", "x.json", "--online", "--document", "missing.txt"], "No such file"),
        (["--output", "x.json", "--online", "--kv-option", "nonsense=1"], "nonsense"),
        ([], "--output"),
    ],
)
def test_bad_input_is_said_in_one_line(
    arguments: list[str],
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    filled = [argument.format(folder="folder.json") for argument in arguments]
    assert cli.main(["heads", model, *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert names(tmp_path) == {"folder.json"}


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["heads", str(tmp_path / "none"), "--output", str(tmp_path / "heads.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert names(tmp_path) == set()


def test_online_types_of_a_document(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, path = tmp_path / "notes.txt", tmp_path / "types.json"
    sentence = "The code of the warm river is 2998. "
    document.write_text(sentence * 20)
    arguments = ["heads", model, "--online", "--output", str(path), "--kv-budget", "1/4", "--kv-option", "tau=0.8"]
    assert cli.main([*arguments, "--document", str(document)]) == 0
    content = json.loads(path.read_text())
    assert content["method"] == "headkv"
    assert content["options"] == {"tau": 0.8}
    assert content["document"] == "notes.txt"
    tokens = content["tokens_seen"]
    kept = [sum(layer[0]) for layer in content["lengths"]]
    assert len(kept) == 2
    assert all(abs(total - 2 * round(tokens / 4)) <= 2 for total in kept), "two KV heads share a quarter each"
    assert {kind for layer in content["types"] for kind in layer[0]} <= {"local", "global"}
    assert names(tmp_path) == {"notes.txt", "types.json", "types.png"}
    output = capsys.readouterr().out
    for layer, (types, lengths) in enumerate(zip(content["types"], content["lengths"])):
        cells = "  ".join(f"{kind[0].upper()} {length:>5}" for kind, length in zip(types[0], lengths[0]))
        assert f"{layer:>5}  {cells}\n" in output
    assert cli.main([*arguments, "--prompt", sentence * 20, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert (printed["lengths"], printed["types"]) == (content["lengths"], content["types"]), "the same text"


def test_a_text_may_have_all_positions_and_no_more(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["heads", model, "--online", "--output", str(tmp_path / "types.json")]
    assert cli.main([*arguments, "--prompt", "the code of " * 140]) == 2
    assert "400" in capsys.readouterr().err
    assert names(tmp_path) == set()


@pytest.mark.parametrize("layers, heads, kv_heads", [(2, 4, 2), (40, 64, 8), (3, 4, 4)])
def test_the_picture_of_a_table(layers: int, heads: int, kv_heads: int) -> None:
    scores = tuple(tuple(float(layer + head) for head in range(heads)) for layer in range(layers))
    table = HeadTable("r2", "f", scores, kv_heads, examples=9, answered=7)
    figure = head_table_map(table)
    assert figure._suptitle.get_text() == "Head scores (7 of 9 prompts count)"
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in maps] == ["Query head", "KV head"][: 2 if heads != kv_heads else 1]
    for axes, count in zip(maps, (heads, kv_heads)):
        drawn = axes.images[0].get_array()
        assert drawn.shape == (layers, count)
        assert float(drawn.sum()) == pytest.approx(100)
        assert bool(axes.texts) == (layers <= 16 and count <= 16)
    figure.canvas.draw()


def test_the_shipped_table_fits_the_embedded_model() -> None:
    """It has to be measured again whenever the weights change: `headkv-mm heads --output heads.json`, then copy it."""
    path = demo.text_model_path()
    model = LlamaForCausalLM.from_pretrained(path)
    table = head_table_for(model)
    check_head_table(table, model)
    assert (table.examples, table.kind) == (100, "r2")
    assert table.answered >= 50, "most prompts were answered right"
    scores = table.kv_scores().flatten().sort(descending=True).values
    assert float(scores[: len(scores) // 2].sum()) > 0.6, "some heads find answers and others do not"
