# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate layers`: the errors against attention by hand, breaks, files, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache, cli, demo
from headkv_mm.calibration.layers import LayerCalibration, calibrate_layers
from headkv_mm.calibration.texts import calibration_texts
from headkv_mm.demo.text_tokenizer import build_text_tokenizer
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import HeadTable, head_table_for, save_head_table
from headkv_mm.layer_tables import layer_table_for, load_layer_table

WORDS = build_text_tokenizer()
SCORES = ((0.3, 0.1, 0.9, 0.2), (0.01, 0.02, 0.0, 0.01))
FEW = LayerCalibration(texts=3, length=70, following=6, entries=12)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        max_position_embeddings=256,
        bos_token_id=WORDS.bos_token_id,
        eos_token_id=WORDS.eos_token_id,
        pad_token_id=WORDS.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def head_table(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tables") / "retrieval.json"
    save_head_table(HeadTable("srh", fingerprint(model), SCORES, kv_heads=2, examples=1, answered=1), path)
    return str(path)


@torch.no_grad()
def naive_errors(model: Any, ids: list[int], head_table: str) -> list[float]:
    """Attention written out, over all entries and over those that a cache of 12 entries has kept."""
    row = torch.tensor([ids])
    few = HeadKVCache(model, "compresskv", budget=12, head_table=head_table, layer_errors=(1.0, 1.0), least=12)
    model(row[:, :-6], past_key_values=few)
    outputs: list[Any] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: outputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    cache = DynamicCache(config=model.config)
    model(row, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(outputs[0], torch.arange(len(ids))[None])
    errors = []
    for index, layer in enumerate(model.model.layers):
        query = layer.self_attn.q_proj(outputs[index]).view(len(ids), 4, 8).transpose(0, 1)  # [H, T, D]
        half = torch.cat([-query[..., 4:], query[..., :4]], dim=-1)
        query = query * cos[0] + half * sin[0]
        keys, values = cache.layers[index].keys[0], cache.layers[index].values[0]
        full, moved = [], []
        for head in range(4):
            kept = set(few.kept_positions(index)[0][head // 2].tolist())
            for at in range(len(ids) - 6, len(ids)):
                for seen, out in (
                    (list(range(at + 1)), full),
                    (sorted(kept | set(range(len(ids) - 6, at + 1))), moved),
                ):
                    logits = query[head, at] @ keys[head // 2, seen].T * 8**-0.5
                    out.append(logits.softmax(-1) @ values[head // 2, seen])
        whole = torch.stack(full)
        errors.append(float((torch.stack(moved) - whole).norm() / whole.norm()))
    return errors


def test_errors_are_those_of_attention_by_hand(model: LlamaForCausalLM, head_table: str) -> None:
    calibration = replace(FEW, head_table=head_table)
    table = calibrate_layers(model, WORDS, calibration)
    texts = calibration_texts(WORDS, texts=3, length=70, seed=0, text=None, label="layers")
    naive = torch.tensor([naive_errors(model, list(ids), head_table) for ids in texts]).mean(0)
    torch.testing.assert_close(torch.tensor(table.errors), naive, rtol=1e-3, atol=1e-5)
    assert all(error > 0.01 for error in table.errors)
    assert table.settings["following"] == 6


def test_a_break_changes_nothing(model: LlamaForCausalLM, head_table: str, tmp_path: Path) -> None:
    calibration, partial = replace(FEW, head_table=head_table), tmp_path / "partial"

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_layers(model, WORDS, calibration, partial=partial, on_text=stop)
    assert partial.exists()
    with pytest.raises(ValueError, match=r"begun with other settings \(seed 0\)"):
        calibrate_layers(model, WORDS, replace(calibration, seed=1), partial=partial)
    seen: list[int] = []
    resumed = calibrate_layers(model, WORDS, calibration, partial=partial, on_text=seen.append)
    assert seen == [2, 3]
    assert not partial.exists()
    assert resumed == calibrate_layers(model, WORDS, calibration)


def test_the_command(model: LlamaForCausalLM, head_table: str, tmp_path: Path, capsys: Any) -> None:
    folder, text, output = tmp_path / "model", tmp_path / "text.txt", tmp_path / "new" / "layers.json"
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    text.write_text("the old mill is warm . " * 60)
    command = ["calibrate", "layers", str(folder), "--head-table", head_table, "--output", str(output)]
    small = ["--texts", "2", "--length", "80", "--following", "5", "--entries", "10"]
    assert cli.main([*command, *small, "--text", str(text)]) == 0
    assert "with 10 entries per KV head; mean of 2 texts" in capsys.readouterr().out
    table = load_layer_table(output)
    assert (table.texts, table.entries, len(table.errors)) == (2, 10, 2)
    assert table.settings["text"][0] == len(text.read_text().strip())
    assert cli.main([*command, *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 2
    assert cli.main([*command, "--texts", "90", "--text", str(text)]) == 2
    assert "give a longer one, or ask for fewer or shorter texts" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "layers.txt")]) == 2
    assert "must be the name of a .json file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": 0}, "texts must be at least 1"),
        ({"entries": 4}, "entries must be at least 8"),
        ({"length": 60}, "use a length of at least 65"),
        ({"length": 400}, "the model was made for 256 positions"),
    ],
)
def test_bad_settings(model: LlamaForCausalLM, head_table: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_layers(model, WORDS, LayerCalibration(**{"head_table": head_table, **settings}))


def test_the_shipped_tables_fit_the_embedded_model() -> None:
    """They are to be measured again whenever the weights change: `headkv-mm heads --kind srh`, `calibrate layers`."""
    model = LlamaForCausalLM.from_pretrained(demo.text_model_path())
    heads, layers = head_table_for(model, kind="srh"), layer_table_for(model)
    assert heads.answered >= 50, "most prompts were answered right"
    assert (layers.texts, layers.entries) == (16, 32)
    assert max(layers.errors) > 2 * min(layers.errors), "some layers need more than others"
