# SPDX-License-Identifier: Apache-2.0
"""compilerkv: one set of entries per layer by value-weighted attention, of which a gate leaves some out."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from headkv_mm import HeadKVCache
from headkv_mm.compiled_tables import (
    CompiledTables,
    compiled_tables_for,
    load_compiled_tables,
    save_compiled_tables,
)
from headkv_mm.fingerprint import fingerprint

from . import naive_selection as naive
from .test_outside_check import BUDGETS, LENGTHS, everything, kept, observed, stock_model
from .tiny_llama import tiny_llama

WEIGHTS = ((1.0, 1.5, 0.8), (0.8, 0.8, 1.25), (1.5, 1.0, 1.0))
EDGES = (0.9, 0.92, 0.93)
GATE = tuple(tuple((1.0 + 0.3 * e, 1.7 + 0.2 * layer, 2.5 - 0.3 * e) for e in range(4)) for layer in range(3))
TABLES: dict[str, Any] = {
    "head_weights": WEIGHTS,
    "gate": GATE,
    "entropy_edges": EDGES,
    "perplexity_edges": (4.0,),
}
SMALL: dict[str, Any] = {
    "head_weights": ((1.0, 1.5), (0.8, 1.0)),
    "gate": (((0.0, 1.5), (0.0, 2.0)),) * 2,
    "entropy_edges": (0.8,),
}
"""For models of two layers with two KV heads: without a known perplexity the second column."""


@lru_cache(maxsize=32)
def value_sizes(tokens: int) -> list[list[list[float]]]:
    """Norms of the values by layer and KV head."""
    model, cache = stock_model(), DynamicCache(config=stock_model().config)
    with torch.no_grad():
        model(observed(tokens)[0], past_key_values=cache)
    return [[[math.hypot(*value) for value in head] for head in layer.values[0].tolist()] for layer in cache.layers]


def mass(seen: naive.Observation, layer: int, window: int = 32) -> list[float]:
    """Mean attention of the last queries and all heads."""
    rows = torch.tensor([head[-window:] for head in seen.maps[layer]], dtype=torch.float64)  # [H, window, T]
    return [float(each) for each in rows.mean((0, 1))]


def scores_by_hand(seen: naive.Observation, layer: int, weights: Any) -> list[float]:
    alpha = [seen.tokens * share for share in mass(seen, layer)]
    sizes = value_sizes(seen.tokens)[layer]
    means = [sum(head) / len(head) for head in sizes]
    return [
        max(weights[layer][g] * alpha[at] * sizes[g][at] / means[g] for g in range(seen.kv_heads))
        for at in range(seen.tokens)
    ]


def threshold_by_hand(seen: naive.Observation, layer: int, perplexity: float | None) -> float:
    entropy = -sum(share * math.log(share) for share in mass(seen, layer) if share > 0) / math.log(seen.tokens)
    row = sum(entropy >= edge for edge in EDGES)
    column = 2 if perplexity is None else int(perplexity >= 4.0)
    return GATE[layer][row][column]


@given(tokens=LENGTHS, budget=BUDGETS, perplexity=st.sampled_from([None, 2.0, 4.0, 9.5]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_what_stays_is_what_the_formula_says(tokens: int, budget: int, perplexity: float | None) -> None:
    ids, seen = observed(tokens)
    found = kept("compilerkv", ids, budget, perplexity=perplexity, **TABLES)
    if tokens <= budget:
        assert found == everything(seen)
        return
    first, last = naive.sinks_and_window(budget, tokens)
    for layer in range(len(seen.maps)):
        scores = scores_by_hand(seen, layer, WEIGHTS)
        threshold = threshold_by_hand(seen, layer, perplexity)
        good = sum(score >= threshold for score in scores[first : tokens - last])
        expected = naive.best(scores, min(good, budget - first - last), first, last)
        assert found[layer] == [expected] * seen.kv_heads
        assert len(expected) <= budget


def test_the_gate_has_an_effect_and_reads_the_perplexity() -> None:
    """So that the test before does not compare budgets only."""
    counts = {
        tuple(len(layer[0]) for layer in kept("compilerkv", observed(130)[0], 80, perplexity=perplexity, **TABLES))
        for perplexity in (None, 2.0, 9.0)
    }
    assert len(counts) == 3 and min(map(min, counts)) < 70


@given(tokens=LENGTHS, budget=BUDGETS)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_identity_tables_are_the_best_within_the_budget(tokens: int, budget: int) -> None:
    ids, seen = observed(tokens)
    found = kept("compilerkv", ids, budget, tables="identity")
    ones = ((1.0,) * 3,) * 3
    nothing = (((0.0, 0.0),),) * 3
    assert kept("compilerkv", ids, budget, head_weights=ones, gate=nothing) == found
    if tokens <= budget:
        assert found == everything(seen)
        return
    first, last = naive.sinks_and_window(budget, tokens)
    for layer in range(len(seen.maps)):
        expected = naive.best(scores_by_hand(seen, layer, ones), budget - first - last, first, last)
        assert found[layer] == [expected] * seen.kv_heads


def test_the_gate_saves_bytes_exactly() -> None:
    ids, seen = observed(130)
    sizes = {}
    for name, gate in (("open", 0.0), ("narrow", 2.0), ("shut", 1e9)):
        cache = HeadKVCache(stock_model(), "compilerkv", budget=60, head_weights=WEIGHTS, gate=(((gate,) * 2,),) * 3)
        with torch.no_grad():
            stock_model()(ids, past_key_values=cache)
        for layer, held in enumerate(cache.compressed_layers):
            scores = scores_by_hand(seen, layer, WEIGHTS)
            good = min(sum(score >= gate for score in scores[4:102]), 28)
            entries = 3 * (4 + 28 + good)
            assert held.store.keys.nbytes == held.store.values.nbytes == entries * 16 * 8
            assert held.store.positions.nbytes == entries * 4
        sizes[name] = cache.nbytes
    assert sizes["open"] > sizes["narrow"] > sizes["shut"]


@pytest.mark.parametrize("budget", [24, 0.4])
def test_an_evicted_entry_is_as_good_as_masked(model: Any, inputs: Any, decode: Any, oracle: Any, budget: Any) -> None:
    cache = HeadKVCache(model, "compilerkv", budget=budget, interval=7, **SMALL)
    run = decode(inputs, cache, 40)
    assert (run.logits - oracle(inputs, run)).abs().max() < 1e-4
    together = [cache.kept_positions(layer) for layer in range(2)]
    for row, pads in enumerate((7, 3, 0)):
        alone = HeadKVCache(model, "compilerkv", budget=budget, interval=7, **SMALL)
        single = {name: tensor[row : row + 1, pads:] for name, tensor in inputs.items()}
        decode(single, alone, 40, forced=run.tokens[row : row + 1])
        for layer in range(2):
            assert str(together[layer][row]) == str(alone.kept_positions(layer)[0])


def test_later_evictions_keep_the_prompts_number(model: Any, decode: Any) -> None:
    ids = torch.randint(6, 120, (1, 90), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for budget in (40, 0.5):
        cache = HeadKVCache(model, "compilerkv", budget=budget, interval=8, **SMALL)
        decode(inputs, cache, 1)
        counts = [[len(head) for head in cache.kept_positions(layer)[0]] for layer in range(2)]
        whole = 40 if budget == 40 else 45
        assert all(count <= whole for layer in counts for count in layer) and min(map(min, counts)) < whole
        decode_more(model, cache, 40)
        later = [[len(head) for head in cache.kept_positions(layer)[0]] for layer in range(2)]
        if budget == 40:
            assert later == counts
        else:
            now = cache.compressed_layers[0].compressor.row_entries[0]
            for before, after in zip(counts, later, strict=True):
                assert after[0] == pytest.approx(4 + (before[0] - 4) * (now - 4) / (whole - 4), abs=1.01)


def decode_more(model: Any, cache: HeadKVCache, tokens: int) -> None:
    """Random tokens, one by one."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(tokens):
        with torch.no_grad():
            model(torch.randint(6, 120, (1, 1), generator=generator), past_key_values=cache)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_generate(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **({"sliding_window": None} if family == "Mistral" else {}),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(5, 120, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    whole = HeadKVCache(model, "compilerkv", budget=1.0, **SMALL)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=whole), expected)
    cache = HeadKVCache(model, "compilerkv", budget=0.4, interval=4, **SMALL)
    made = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert made.shape == expected.shape and cache.nbytes < whole.nbytes
    for layer in range(2):
        for heads in cache.kept_positions(layer):
            assert len({str(head) for head in heads}) == 1


def tables_of(model: Any, **change: Any) -> CompiledTables:
    content: dict[str, Any] = {
        **SMALL,
        "perplexity_edges": (),
        "fingerprint": fingerprint(model),
        "head_support": ((5, 6), (7, 8)),
        "gate_support": (((1, 2), (3, 4)),) * 2,
        "budgets": (0.25,),
        "texts": 3,
        "validation": ({"budget": 0.25, "full": 1.0, "identity": 1.5, "compiled": 1.4, "held": 0.9},),
        "log": ({"text": 0, "full": 1.0},),
        "settings": {"length": 100},
        "versions": {"torch": "2"},
    }
    return CompiledTables(**{**content, **change})


def test_tables_come_from_files_and_go_with_saved_caches(tmp_path: Path) -> None:
    model, path = tiny_llama(2, 4, 2, 8), tmp_path / "tables.json"
    tables = tables_of(model)
    save_compiled_tables(tables, path)
    assert load_compiled_tables(path) == tables
    ids = torch.randint(0, 8, (1, 100), generator=torch.Generator().manual_seed(0))
    kept = []
    for options in ({"tables": str(path)}, SMALL):
        cache = HeadKVCache(model, "compilerkv", budget=60, **options)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        kept.append([cache.kept_positions(layer)[0][0].tolist() for layer in range(2)])
    assert kept[0] == kept[1] and min(map(len, kept[0])) < 60
    cache.save(tmp_path / "cache.safetensors", model)
    again = HeadKVCache.load(tmp_path / "cache.safetensors", model)
    for one in (cache, again):
        for _ in range(40):
            with torch.no_grad():
                last = model(ids[:, :1], past_key_values=one).logits
        kept.append([one.kept_positions(layer)[0][0].tolist() for layer in range(2)])
    assert kept[2] == kept[3] and torch.isfinite(last).all()


def test_foreign_and_damaged_tables_are_refused(tmp_path: Path) -> None:
    model, path = tiny_llama(2, 4, 2, 8), tmp_path / "tables.json"
    save_compiled_tables(tables_of(model), path)
    with pytest.raises(ValueError, match="measured on another model, or on other weights"):
        HeadKVCache(tiny_llama(2, 4, 2, 16), "compilerkv", tables=str(path))
    with pytest.raises(ValueError, match="2 layers with 2 KV heads, and the model has 3 with 2"):
        compiled_tables_for(tiny_llama(3, 4, 2, 8), path)
    with pytest.raises(ValueError, match=r"no compiled tables for this model; .* or pass tables='identity'"):
        HeadKVCache(model, "compilerkv")
    with pytest.raises(FileNotFoundError, match="no such compiled table"):
        HeadKVCache(model, "compilerkv", tables=str(tmp_path / "none.json"))
    content = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "has version 2"),
        ({"format": "headkv-mm layer table"}, "is no compiled table"),
        ({"head_weights": [[1.0, 1.0], [1.0, 1.0]]}, "its content is not what its sha256 says"),
        ({"texts": 4}, "its content is not what its sha256 says"),
        ({"sha256": None}, "sha256 must be of type str"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            load_compiled_tables(path)
    for change, message in (
        ({"gate": (((0.0, 0.9),),) * 2}, r"must have the shape \[layers\]\[2\]\[2\]"),
        ({"gate": SMALL["gate"][:1]}, "gate_support must have a number for every cell"),
        ({"head_support": ((5, 6),)}, "head_support must have a number for every cell"),
        ({"budgets": (1.0,)}, "budgets must be shares"),
        ({"texts": 0}, "at least one text"),
    ):
        with pytest.raises(ValueError, match=message):
            tables_of(model, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_weights": ((1.0, 1.0), (1.0,))}, "same number of head weights"),
        ({"head_weights": ((1.0, 0.0),)}, "head weights must be positive"),
        ({"head_weights": "a.json"}, "head weights must be a list"),
        ({"gate": (((0.0,),),)}, r"the gate must have the shape \[layers\]\[1\]\[2\]"),
        ({"gate": (((0.0, -1.0),),)}, "finite numbers that are not negative"),
        ({"gate": 0.9}, "the gate must be lists of numbers"),
        ({"entropy_edges": (0.5, 0.4)}, "entropy_edges must ascend"),
        ({"perplexity": 0.5}, "perplexity must be a number, at least 1"),
        ({"tables": 3}, "tables must be the name of a file"),
        ({"pool": 2}, "pool must be an odd number"),
        ({"window": 0}, "window must be a whole number"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadKVCache(tiny_llama(2, 4, 2, 8), "compilerkv", **options)


def test_tables_of_another_shape_are_refused(inputs: dict[str, Tensor], model: Any) -> None:
    for options, message in (
        ({**SMALL, "head_weights": ((1.0,) * 3,) * 2}, "2 layers with 3 KV heads, and the model has 2 layers with 2"),
        ({**SMALL, "gate": SMALL["gate"] * 2}, "thresholds are of 4 layers, and the model has 2"),
    ):
        cache = HeadKVCache(model, "compilerkv", budget=8, **options)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(**inputs, past_key_values=cache)
