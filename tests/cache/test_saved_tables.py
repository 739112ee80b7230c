# SPDX-License-Identifier: Apache-2.0
"""A saved cache goes on as before when the tables that its method was given are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from headkv_mm import Compression, HeadKVCache
from headkv_mm.compiled_tables import CompiledTables, save_compiled_tables
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import HeadTable, save_head_table
from headkv_mm.known import known_of, with_known
from headkv_mm.layer_tables import LayerTable, save_layer_table
from headkv_mm.tsp_tables import TSPTable, save_tsp_table

from .tiny_llama import tiny_llama

LAYERS, HEADS, KV_HEADS = 3, 4, 2
METHODS: dict[str, dict[str, Any]] = {
    "headkv-r2": {"table": "r2.json"},
    "compresskv": {"head_table": "srh.json", "layer_table": "layers.json", "least": 8},
    "compilerkv": {"tables": "compiled.json"},
    "fastkv": {"table": "tsp.json", "tsp_least": 8},
}
SCORES = tuple(tuple(float(1 + 5 * head + layer) for head in range(HEADS)) for layer in range(LAYERS))


def write_tables(model: LlamaForCausalLM, folder: Path) -> None:
    of = {"fingerprint": fingerprint(model)}
    for kind in ("r2", "srh"):
        save_head_table(HeadTable(kind, of["fingerprint"], SCORES, KV_HEADS, 3, 2), folder / f"{kind}.json")
    save_layer_table(LayerTable(errors=(0.2, 0.7, 0.1), entries=32, texts=4, **of), folder / "layers.json")
    save_tsp_table(TSPTable(distances=(0.01, 0.0, 0.0), tolerance=0.1, ratio=0.2, texts=2, **of), folder / "tsp.json")
    tables = CompiledTables(
        head_weights=((1.0, 1.5), (0.8, 1.0), (1.2, 0.9)),
        gate=(((0.0, 0.8), (0.0, 1.2)),) * LAYERS,
        entropy_edges=(0.8,),
        perplexity_edges=(),
        head_support=((5, 6),) * LAYERS,
        gate_support=(((1, 2), (3, 4)),) * LAYERS,
        budgets=(0.25,),
        texts=3,
        **of,
    )
    save_compiled_tables(tables, folder / "compiled.json")


def cache_of(model: LlamaForCausalLM, method: str, folder: Path, **settings: Any) -> HeadKVCache:
    options = {
        name: str(folder / value) if isinstance(value, str) else value for name, value in METHODS[method].items()
    }
    return HeadKVCache(model, method, **options, **settings)


def read(model: LlamaForCausalLM, cache: HeadKVCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, past_key_values=cache).logits[:, -1]
    return logits


def kept(cache: HeadKVCache) -> list[list[list[int]]]:
    return [[head.tolist() for head in cache.kept_positions(layer)[0]] for layer in range(LAYERS)]


@pytest.mark.parametrize("decided", [True, False], ids=["decided", "undecided"])
@pytest.mark.parametrize("method", METHODS)
def test_the_tables_may_be_gone(method: str, decided: bool, tmp_path: Path) -> None:
    model = tiny_llama(LAYERS, HEADS, KV_HEADS, 8)
    write_tables(model, tmp_path)
    # A prompt within its budget is kept whole: how heads share it is decided after loading.
    ids = torch.randint(0, 8, (1, 100 if decided else 25), generator=torch.Generator().manual_seed(0))
    cache = cache_of(model, method, tmp_path, budget=30, interval=4)
    read(model, cache, ids)
    assert (max(map(len, kept(cache)[0])) < ids.shape[1]) == decided
    cache.save(tmp_path / "cache.safetensors", model)
    expected = [read(model, cache, step[None, None]) for step in ids[0].repeat(2)[:40]]
    again = read(model, cache, ids[:, :20])
    for table in tmp_path.glob("*.json"):
        table.unlink()
    with pytest.raises(FileNotFoundError):
        cache_of(model, method, tmp_path, budget=30)  # so it would be read
    loaded = HeadKVCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.compression == cache.compression
    for step, logits in zip(ids[0].repeat(2)[:40], expected, strict=True):
        assert torch.equal(read(model, loaded, step[None, None]), logits)
    assert torch.equal(read(model, loaded, ids[:, :20]), again)
    assert kept(loaded) == kept(cache)
    loaded.save(tmp_path / "once more", model)  # and a loaded one can be saved, with all that it knows
    assert kept(HeadKVCache.load(tmp_path / "once more", model)) == kept(cache)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_makes_the_same_pieces(method: str, tmp_path: Path) -> None:
    model = tiny_llama(LAYERS, HEADS, KV_HEADS, 8)
    write_tables(model, tmp_path)
    cache = cache_of(model, method, tmp_path)
    bound, stated = cache.compressed_layers[0].pieces, cache.compression.pieces("text")
    assert bound is not None and stated is not None and bound != stated
    assert with_known(stated, known_of(bound, stated)) == bound
    assert known_of(stated, stated) == {}


def test_what_json_cannot_hold_is_asked_of_the_model_again() -> None:
    model = tiny_llama(LAYERS, HEADS, KV_HEADS, 8)
    cache = HeadKVCache(model, "laprox")  # knows output projections
    bound, stated = cache.compressed_layers[0].pieces, cache.compression.pieces("text")
    assert bound is not None and stated is not None
    assert known_of(bound, stated) == {}


@pytest.mark.parametrize(
    "known", [{"reader": {"scores": [[1.0]]}}, {"allocator": {"colour": 1}}, {"allocator": {"scores": [["a"]]}}]
)
def test_what_does_not_fit_is_refused(known: dict[str, Any]) -> None:
    stated = Compression("headkv-r2").pieces("text")
    assert stated is not None
    with pytest.raises(ValueError, match=r"does not fit the method|scores must be finite numbers"):
        with_known(stated, known)


def test_the_same_weights_read_in_another_way_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(LAYERS, HEADS, KV_HEADS, 8)
    cache = HeadKVCache(model, "snapkv", budget=10)
    read(model, cache, torch.zeros(1, 20, dtype=torch.long))
    cache.save(tmp_path / "cache", model)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(ValueError, match=r"with another configuration \(rope_parameters\)"):
        HeadKVCache.load(tmp_path / "cache", model)
