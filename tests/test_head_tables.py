# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache, demo
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import (
    SHIPPED,
    HeadTable,
    check_head_table,
    head_table_for,
    load_head_table,
    save_head_table,
)

SCORES = ((0.5, 0.25, 0.0, 1.0), (0.1, 0.2, 0.3, 1 / 3))


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def table_of(model: LlamaForCausalLM) -> HeadTable:
    return HeadTable(
        kind="r2",
        fingerprint=fingerprint(model),
        scores=SCORES,
        kv_heads=2,
        examples=10,
        answered=7,
        settings={"length": 64, "seed": 0},
        versions={"torch": "2", "triton": None},
    )


def test_kv_scores_are_shares_of_the_sum() -> None:
    scores = table_of(tiny_model()).kv_scores()
    total = sum(map(sum, SCORES))
    expected = torch.tensor([[0.75, 1.0], [0.1 + 0.2, 0.3 + 1 / 3]], dtype=torch.float64) / total
    torch.testing.assert_close(scores, expected)


@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    layers=st.integers(1, 4),
    values=st.lists(st.floats(0, 1e6), min_size=48, max_size=48),
)
def test_kv_scores_keep_every_group_together(kv_heads: int, group: int, layers: int, values: list[float]) -> None:
    heads = kv_heads * group
    rows = tuple(tuple(values[layer * heads : (layer + 1) * heads]) for layer in range(layers))
    total = math.fsum(value for row in rows for value in row)
    if total < 1e-300:
        with pytest.raises(ValueError, match="all zero"):
            HeadTable("r2", "f", tuple(tuple(0.0 for _ in row) for row in rows), kv_heads, 1, 1)
        return
    scores = HeadTable("r2", "f", rows, kv_heads, 1, 1).kv_scores()
    assert scores.shape == (layers, kv_heads)
    assert float(scores.sum()) == pytest.approx(1.0)
    for layer, row in enumerate(rows):
        for head in range(kv_heads):
            mine = math.fsum(row[head * group : (head + 1) * group])
            assert float(scores[layer, head]) == pytest.approx(mine / total)


def test_a_saved_table_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    table = table_of(tiny_model())
    path = tmp_path / "heads.json"
    path.write_text("what was there before")
    save_head_table(table, path)
    assert load_head_table(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["heads.json"], "nothing temporary is left"
    content = json.loads(path.read_text())
    stated = {name: content[name] for name in ("format", "version", "kind", "layers", "query_heads", "kv_heads")}
    assert stated == {
        "format": "headkv-mm head table",
        "version": 1,
        "kind": "r2",
        "layers": 2,
        "query_heads": 4,
        "kv_heads": 2,
    }


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    table, path = table_of(tiny_model()), tmp_path / "heads.json"
    save_head_table(table, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Out of range float"):
        save_head_table(replace(table, settings={"length": math.nan}), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def set_to(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_to("format", "something else"), "is no head table"),
        (set_to("version", 2), "has version 2 of the format, and this package reads 1"),
        (set_to("kind", "unheard"), "kind 'unheard' are unknown; known: r2"),
        (set_to("fingerprint", 5), "fingerprint must be of type str, got int"),
        (lambda content: content.pop("fingerprint"), "fingerprint must be of type str, got NoneType"),
        (set_to("layers", 3), "must have 3 layers of 4 query heads"),
        (set_to("query_heads", 2), "must have 2 layers of 2 query heads"),
        (set_to("kv_heads", 3), "4 query heads cannot be shared among 3 KV heads"),
        (set_to("kv_heads", 0), "cannot be shared among 0 KV heads"),
        (set_to("kv_heads", True), "kv_heads must be of type int, got bool"),
        (set_to("answered", 0), "0 of 10 examples"),
        (set_to("answered", 11), "11 of 10 examples"),
        (lambda content: content["scores"].pop(), "must have 2 layers"),
        (lambda content: content["scores"][1].pop(), "must have 2 layers of 4 query heads"),
        (lambda content: content["scores"][1].__setitem__(0, math.nan), "must be finite numbers"),
        (lambda content: content["scores"][1].__setitem__(0, math.inf), "must be finite numbers"),
        (lambda content: content["scores"][1].__setitem__(0, -0.5), "not negative"),
        (lambda content: content["scores"][1].__setitem__(0, 10**400), "is damaged"),
        (lambda content: content["scores"][1].__setitem__(0, "0.5"), "scores must be numbers"),
        (lambda content: content["scores"].__setitem__(1, "abcd"), "must be a list"),
        (set_to("scores", [[0.0] * 4] * 2), "all zero"),
        (set_to("scores", None), "scores must be of type list"),
        (set_to("settings", []), "settings must be of type dict"),
    ],
)
def test_edited_tables_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = tmp_path / "heads.json"
    save_head_table(table_of(tiny_model()), path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_head_table(path)
    assert str(path) in str(caught.value)
    assert "headkv-mm heads" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"format": "headkv-mm head table"', b"[" * 9999])
def test_files_of_another_kind_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is no head table"):
        load_head_table(path)


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model().half().float()
    path = tmp_path / "heads.json"
    save_head_table(table_of(model), path)
    assert head_table_for(model, str(path)) == table_of(model)
    assert head_table_for(model.config, path) == table_of(model), "of a configuration the shape is compared"
    assert head_table_for(tiny_model().half(), path) == table_of(model), "the same weights in half precision"
    with pytest.raises(ValueError, match=r"other weights of it .its fingerprint is [0-9a-f]{16}"):
        head_table_for(tiny_model(seed=1), path)
    for changes in ({"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"num_attention_heads": 2}):
        other = tiny_model(**changes)
        for what in (other, other.config):
            with pytest.raises(ValueError, match="of another model: it has 2 layers, 4 query heads, 2 KV heads"):
                head_table_for(what, path)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1e-3)  # as a step of training would
    with pytest.raises(ValueError, match="other weights"):
        check_head_table(load_head_table(path), model)


def test_a_missing_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such head table; make one with `headkv-mm heads"):
        head_table_for(tiny_model(), tmp_path / "nowhere.json")


def test_the_shipped_table_is_for_the_embedded_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    monkeypatch.setattr(demo, "text_model_path", lambda: tmp_path)
    with pytest.raises(ValueError, match="no head table for this model; make one"):
        head_table_for(model)
    save_head_table(table_of(model), tmp_path / SHIPPED["r2"])
    assert head_table_for(model) == table_of(model)
    for stranger in (other, tiny_model(num_hidden_layers=3), model.config):
        with pytest.raises(ValueError, match=r"no head table for this model; make one .* pass table='FILE.json'"):
            head_table_for(stranger)


def test_a_cache_divides_its_budget_by_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADKV_MM_KERNELS", "reference")
    model = tiny_model()
    path = tmp_path / "heads.json"
    save_head_table(table_of(model), path)
    cache = HeadKVCache(model, "headkv-r2", budget=20, table=str(path), beta=1.0)
    with torch.no_grad():
        model(torch.randint(0, 20, (1, 80), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    kept = torch.tensor([layer[0] for layer in cache.report().lengths], dtype=torch.float64)
    assert int(kept.sum()) == 20 * 4, "the budget is exact over the model"
    protected = 4 + 8  # sinks and window
    shares = protected + table_of(model).kv_scores() * (20 - protected) * 4  # beta 1: everything else is pooled
    assert float((kept - shares).abs().max()) < 1
    assert kept.unique().numel() == 4
    with pytest.raises(ValueError, match="other weights"):
        HeadKVCache(tiny_model(seed=1), "headkv-r2", budget=20, table=str(path))
    with pytest.raises(ValueError, match="no head table for this model"):
        HeadKVCache(model, "headkv-r2", budget=20)
