# SPDX-License-Identifier: Apache-2.0
"""compresskv: one set of entries per layer by retrieval heads, budgets by layer errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm import HeadKVCache
from headkv_mm.allocators.layer_table import layer_shares
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import HeadTable, save_head_table
from headkv_mm.layer_tables import LayerTable, layer_table_for, load_layer_table, save_layer_table
from headkv_mm.scorers.retrieval import best_heads

from . import naive_selection as naive
from .test_outside_check import kept, observed
from .tiny_llama import tiny_llama

SCORES = ((0.1, 3.0, 0.2, 0.9, 0.0, 2.0), (0.01, 0.0, 0.02, 0.05, 0.0, 0.0), (9.0, 0.5, 8.0, 7.0, 0.1, 6.0))
"""The second layer's best head is under 5 % of the model's best, so all of its heads count."""
ERRORS = (0.5, 0.1, 0.4)
TABLES: dict[str, Any] = {"head_scores": SCORES, "layer_errors": ERRORS, "least": 10}


def naive_shares(errors: list[float], budget: int, limit: int, least: int, most: float) -> list[int]:
    """The formula, and single entries to the largest errors or from the smallest until the sum is right."""
    count, total = len(errors), sum(errors)
    low, high = min(least, budget), max(min(int(most * budget), limit), budget)
    shares = [min(max(low + int(error / total * (budget - low) * count), low), high) for error in errors]
    order = sorted(range(count), key=lambda layer: -errors[layer])
    while sum(shares) != budget * count:
        missing = sum(shares) < budget * count
        for layer in order if missing else order[::-1]:
            if missing and shares[layer] < high and sum(shares) < budget * count:
                shares[layer] += 1
            elif not missing and shares[layer] > low and sum(shares) > budget * count:
                shares[layer] -= 1
    return shares


@given(
    errors=st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=12).filter(lambda e: sum(e) > 0.001),
    budget=st.integers(1, 300),
    limit=st.integers(1, 500),
    least=st.integers(1, 64),
    most=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
)
def test_shares_are_exact_and_within_their_limits(
    errors: list[float], budget: int, limit: int, least: int, most: float
) -> None:
    shares = layer_shares(tuple(errors), budget, limit, least, most)
    assert sum(shares) == budget * len(errors)
    low, high = min(least, budget), max(min(int(most * budget), limit), budget)
    assert all(low <= share <= high for share in shares)
    # A layer with a larger error never keeps less, but for the entries that make the sum right.
    for left, right in zip(errors, shares):
        for other, share in zip(errors, shares):
            if left > other:
                assert right >= share - 1 - budget // max(len(errors), 1)


@pytest.mark.parametrize("budget", [32, 64, 200, 1024])
def test_shares_are_those_of_the_closed_form(budget: int) -> None:
    """A model of 32 layers whose errors fall like those that are published: large at first and last."""
    errors = [1.0 + 3.0 / (1 + layer) + 0.02 * max(layer - 20, 0) ** 2 / 7 for layer in range(32)]
    expected = naive_shares(errors, budget, 8192, 32, 3.0)
    found = layer_shares(tuple(errors), budget, 8192, 32, 3.0)
    assert sum(found) == sum(expected) == 32 * budget
    assert max(abs(a - b) for a, b in zip(found, expected)) <= 1
    assert found[0] == max(found)


def test_the_best_heads_count() -> None:
    assert best_heads(SCORES, 0, 4, 0.05) == [1, 5, 3, 2]
    assert best_heads(SCORES, 1, 4, 0.05) == [0, 1, 2, 3, 4, 5]
    assert best_heads(SCORES, 1, 4, 0.0) == [3, 2, 0, 1]


@pytest.mark.parametrize(("tokens", "budget"), [(64, 16), (97, 30), (130, 20), (130, 60)])
def test_what_stays_is_what_the_formula_says(tokens: int, budget: int) -> None:
    ids, seen = observed(tokens)
    found = kept("compresskv", ids, budget, **TABLES)
    sinks = min(4, budget // 4)
    shares = naive_shares(list(ERRORS), budget - sinks, tokens - sinks, 10, 3.0)
    for layer, maps in enumerate(seen.maps):
        counted = best_heads(SCORES, layer, 4, 0.05)
        rows = torch.tensor([maps[head][-8:] for head in counted], dtype=torch.float64)  # [heads, 8, T]
        mass = rows.mean((0, 1))
        smooth = [float(mass[max(at - 2, 0) : at + 3].mean()) for at in range(tokens)]
        window = min(8, (budget - sinks) // 2)
        expected = naive.best(naive.single(smooth), shares[layer] - window, sinks, window)
        assert found[layer] == [expected] * seen.kv_heads


def test_an_evicted_entry_is_as_good_as_masked(model: Any, inputs: Any, decode: Any, oracle: Any) -> None:
    tables = {"head_scores": [[0.1, 2.0, 0.3, 0.0, 0.9, 0.2, 0.1, 0.8], [1.0] * 8], "layer_errors": [1.0, 2.0]}
    cache = HeadKVCache(model, "compresskv", budget=12, interval=7, least=8, **tables)
    run = decode(inputs, cache, 40)
    assert (run.logits - oracle(inputs, run)).abs().max() < 1e-4
    together = [cache.kept_positions(layer) for layer in range(2)]
    for row, pads in enumerate((7, 3, 0)):
        alone = HeadKVCache(model, "compresskv", budget=12, interval=7, least=8, **tables)
        decode(
            {name: tensor[row : row + 1, pads:] for name, tensor in inputs.items()},
            alone,
            40,
            forced=run.tokens[row : row + 1],
        )
        for layer in range(2):
            assert str(together[layer][row]) == str(alone.kept_positions(layer)[0])
            assert len({str(head) for head in together[layer][row]}) == 1  # one set for all heads


def tables_of(model: Any, folder: Path) -> dict[str, str]:
    scores = tuple(tuple(float(head + 1) for head in range(4)) for _ in range(2))
    common = {"fingerprint": fingerprint(model)}
    save_head_table(
        HeadTable("srh", scores=scores, kv_heads=2, examples=3, answered=2, **common), folder / "heads.json"
    )
    save_layer_table(LayerTable(errors=(0.2, 0.7), entries=32, texts=4, **common), folder / "layers.json")
    return {"head_table": str(folder / "heads.json"), "layer_table": str(folder / "layers.json")}


def test_tables_come_from_files(tmp_path: Path) -> None:
    model = tiny_llama(2, 4, 2, 8)
    tables = tables_of(model, tmp_path)
    ids = torch.randint(0, 8, (1, 100), generator=torch.Generator().manual_seed(0))
    cache = HeadKVCache(model, "compresskv", budget=40, **tables)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    lengths = [len(cache.kept_positions(layer)[0][0]) for layer in range(2)]
    assert sum(lengths) == 2 * 40 and lengths[1] > lengths[0] >= 32
    assert load_layer_table(tables["layer_table"]).errors == (0.2, 0.7)
    cache.save(tmp_path / "cache.safetensors", model)
    again = HeadKVCache.load(tmp_path / "cache.safetensors", model)
    assert again.kept_positions(1)[0][0].tolist() == cache.kept_positions(1)[0][0].tolist()


def test_foreign_tables_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(2, 4, 2, 8)
    tables = tables_of(model, tmp_path)
    with pytest.raises(ValueError, match="measured on another model, or on other weights"):
        HeadKVCache(tiny_llama(2, 4, 2, 16), "compresskv", **tables)
    with pytest.raises(ValueError, match="it has 2 layers, and the model has 3 with full attention"):
        layer_table_for(tiny_llama(3, 4, 2, 8), tables["layer_table"])
    with pytest.raises(ValueError, match="is no layer table"):
        load_layer_table(tables["head_table"])
    table = HeadTable("r2", fingerprint(model), ((1.0,) * 4,) * 2, kv_heads=2, examples=1, answered=1)
    save_head_table(table, tmp_path / "r2.json")
    with pytest.raises(ValueError, match=r"of kind .r2., and this method needs .srh.: make one with .*--kind srh"):
        HeadKVCache(model, "compresskv", **{**tables, "head_table": str(tmp_path / "r2.json")})
    with pytest.raises(ValueError, match="there is no head table for this model"):
        HeadKVCache(model, "compresskv")
    with pytest.raises(ValueError, match="there is no layer table for this model"):
        HeadKVCache(model, "compresskv", head_table=tables["head_table"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 0}, "least must be a whole number of entries"),
        ({"most": 0.5}, "most must be at least 1"),
        ({"layer_errors": (0.0, 0.0)}, "not all zero"),
        ({"layer_errors": (1.0, float("nan"))}, "finite numbers"),
        ({"heads": 0}, "heads must be a whole number"),
        ({"weak": 2.0}, r"weak must lie in \[0, 1\]"),
        ({"pool": 4}, "pool must be an odd number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadKVCache(tiny_llama(2, 4, 2, 8), "compresskv", **options)


def test_tables_of_another_shape_are_refused(inputs: dict[str, Tensor], model: Any) -> None:
    cache = HeadKVCache(model, "compresskv", budget=8, head_scores=((1.0,) * 4,) * 2, layer_errors=(1.0, 1.0))
    with torch.no_grad(), pytest.raises(ValueError, match="with 4 query heads, and the model has 2 layers with 8"):
        model(**inputs, past_key_values=cache)
