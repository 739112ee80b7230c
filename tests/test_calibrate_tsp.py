# SPDX-License-Identifier: Apache-2.0
"""The calibration of fastkv and its tables."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache, cli
from headkv_mm.calibration import needle_prompt
from headkv_mm.calibration.tsp import TSPCalibration, calibrate_tsp
from headkv_mm.demo.text_tokenizer import build_text_tokenizer
from headkv_mm.fingerprint import fingerprint
from headkv_mm.tsp_tables import TSPTable, layer_for, load_tsp_table, save_tsp_table

WORDS = build_text_tokenizer()
FEW = TSPCalibration(texts=2, length=140, ratio=0.5, tolerance=0.1)
LAYERS = 3


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the kernels would take longer than all that runs here."""
    monkeypatch.setenv("HEADKV_MM_KERNELS", "reference")


def small_model(seed: int = 0, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        max_position_embeddings=512,
        pad_token_id=WORDS.pad_token_id,
        bos_token_id=WORDS.bos_token_id,
        eos_token_id=WORDS.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def table_of(model: Any, distances: tuple[float, ...] = (0.5, 0.06, 0.0)) -> TSPTable:
    return TSPTable(
        fingerprint=fingerprint(model),
        distances=distances,
        tolerance=0.1,
        ratio=0.2,
        texts=4,
        settings={"length": 140},
        versions={"torch": "2"},
    )


@torch.no_grad()
def distance_by_hand(model: Any, ids: torch.Tensor, layer: int) -> float:
    """Run the layers one by one, once over everything and once over the tokens that go on."""
    logits = model(ids, past_key_values=HeadKVCache(model, "fastkv", budget=8, tsp_layer=layer, tsp_ratio=0.5)).logits
    going = (~logits[0].isnan().any(-1)).nonzero()[:, 0]
    assert len(going) == round(0.5 * ids.shape[1])
    last = []
    for chosen in (torch.arange(ids.shape[1]), going):
        core, places = model.model, torch.arange(ids.shape[1])
        hidden = core.embed_tokens(ids)
        for index, block in enumerate(core.layers):
            rotations = core.rotary_emb(hidden, places[None])
            hidden = block(hidden, attention_mask=None, position_embeddings=rotations)
            if index == layer:
                hidden, places = hidden[:, chosen], places[chosen]
        last.append(core.norm(hidden)[0, -1].double())
    return float((last[1] - last[0]).norm() / last[0].norm())


def test_distances_are_those_of_layers_run_by_hand() -> None:
    model = small_model()
    before = model.config._attn_implementation
    table = calibrate_tsp(model, WORDS, FEW)
    assert model.config._attn_implementation == before
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    texts = [needle_prompt(WORDS, random.Random(f"tsp 0 {index}"), 140, index / 9).ids for index in range(2)]
    for layer in range(LAYERS - 1):
        by_hand = [distance_by_hand(model, torch.tensor([ids]), layer) for ids in texts]
        assert table.distances[layer] == pytest.approx(sum(by_hand) / 2, rel=1e-3)
        assert table.distances[layer] > 0
    assert table.distances[-1] == 0
    assert table.fingerprint == fingerprint(model)


def test_the_first_layer_within_the_tolerance() -> None:
    model = small_model()
    assert table_of(model).layer == 1
    assert table_of(model, (0.5, 0.2, 0.0)).layer == 2
    assert table_of(model, (0.1, 0.2, 0.3)).layer == 0
    assert table_of(model, (0.2, 0.3)).layer == 1, "after the last layer nothing is lost, whatever was measured"


def test_a_broken_off_calibration_goes_on(tmp_path: Path) -> None:
    model, partial = small_model(), tmp_path / "partial"
    seen: list[int] = []

    def break_off(done: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_tsp(model, WORDS, FEW, partial=partial, on_text=break_off)
    with pytest.raises(ValueError, match=r"begun with other settings \(length 140\)"):
        calibrate_tsp(model, WORDS, replace(FEW, length=141), partial=partial)
    whole = calibrate_tsp(model, WORDS, FEW)
    assert calibrate_tsp(model, WORDS, FEW, partial=partial, on_text=seen.append) == whole
    assert seen == [1, 2]
    assert not partial.exists()


def test_a_table_says_the_layer_of_its_model(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "tsp.json"
    table = table_of(model)
    save_tsp_table(table, path)
    assert load_tsp_table(path) == table
    assert HeadKVCache(model, "fastkv", table=str(path)).propagation.layer == 1
    assert HeadKVCache(model, "fastkv").propagation.layer == round(LAYERS / 2) - 1
    assert [layer_for(small_model(layers=layers)) for layers in (1, 2, 4, 6)] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="was measured on another model, or on other weights"):
        HeadKVCache(small_model(seed=1), "fastkv", table=str(path))
    with pytest.raises(ValueError, match="of another model: it has 3 layers, and the model has 2"):
        HeadKVCache(small_model(layers=2), "fastkv", table=str(path))
    with pytest.raises(FileNotFoundError, match="no such TSP table; make one with `headkv-mm calibrate tsp"):
        HeadKVCache(model, "fastkv", table=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2"),
        ({"format": "headkv-mm head table"}, "is no TSP table"),
        ({"layer": 2}, "layer must be 1 with these distances"),
        ({"distances": []}, "distances must be finite numbers"),
        ({"distances": [0.5, "a", 0.0]}, "distances must be numbers"),
        ({"distances": [0.5, -1.0, 0.0]}, "distances must be finite numbers"),
        ({"ratio": 0.0}, "ratio must be a share"),
        ({"tolerance": "0.1"}, "tolerance must be of type float"),
        ({"texts": 0}, "at least one text"),
        ({"fingerprint": None}, "fingerprint must be of type str"),
    ],
    ids=str,
)
def test_damaged_tables_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "tsp.json"
    save_tsp_table(table_of(small_model()), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_tsp_table(path)


def test_what_cannot_be_measured_is_refused() -> None:
    for change, message in (
        ({"ratio": 1.0}, "ratio must lie between 0 and 1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"texts": 0}, "texts must be at least 1"),
        ({"length": 100}, "use a length of at least 129"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(FEW, **change)
    model = small_model()
    with pytest.raises(ValueError, match="made for 512 positions, and the texts have 600"):
        calibrate_tsp(model, WORDS, replace(FEW, length=600))
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, and 2 texts of 140 need 280"):
        calibrate_tsp(model, WORDS, FEW, text="the code of the river is 4 . " * 20)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="has no list of decoder layers that take"):
        calibrate_tsp(gpt2, WORDS, FEW)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder, path = small_model(), tmp_path / "model", tmp_path / "tsp.json"
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the code of the river is 4 . " * 60)
    few = ("--texts", "2", "--length", "140", "--ratio", "0.5", "--tolerance", "100")
    command = ("calibrate", "tsp", str(folder), "--output", str(path), *few)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "    0  " in printed and printed.count("*") == 2 and str(path) in printed
    generated = load_tsp_table(path)
    assert (generated.layer, generated.texts, generated.ratio) == (0, 2, 0.5)
    assert cli.main((*command, "--text", str(tmp_path / "text.txt"), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["distances"] != list(generated.distances)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "text.txt", "tsp.json"]
    assert cli.main(("calibrate", "tsp", str(folder), "--output", str(tmp_path))) == 2
    assert "must be the name of a .json file" in capsys.readouterr().err
