# SPDX-License-Identifier: Apache-2.0
"""What methods keep of a prompt, against the papers' formulas on a stock model's full attention maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache

from . import naive_selection as naive

LENGTHS = st.sampled_from([12, 20, 33, 50, 64, 97, 130])
BUDGETS = st.integers(8, 80)


@lru_cache(maxsize=1)
def stock_model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        # Wide weights make attention sharp, so that heads differ.
        initializer_range=0.35,
    )
    model = LlamaForCausalLM(config).eval().double()
    # Eager attention everywhere: its softmax is in float32, and the keys of later layers shall be the same to the bit.
    model.set_attn_implementation("eager")
    return model


@lru_cache(maxsize=64)
def observed(tokens: int) -> tuple[torch.Tensor, naive.Observation]:
    ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return ids, naive.observe(stock_model(), ids)


def kept(method: str, ids: torch.Tensor, budget: int | float, **options: Any) -> list[list[set[int]]]:
    """Positions by layer and KV head after a prompt."""
    cache = HeadKVCache(stock_model(), method, budget=budget, **options)
    with torch.no_grad():
        stock_model()(ids, past_key_values=cache)
    return [[set(head.tolist()) for head in cache.kept_positions(layer)[0]] for layer in range(len(cache))]


def every_head(seen: naive.Observation, choose: Callable[[int, int], set[int]]) -> list[list[set[int]]]:
    return [[choose(layer, head) for head in range(seen.kv_heads)] for layer in range(len(seen.maps))]


def everything(seen: naive.Observation) -> list[list[set[int]]]:
    return every_head(seen, lambda layer, head: set(range(seen.tokens)))


@given(tokens=LENGTHS, budget=BUDGETS)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_streaming_keeps_sinks_and_the_newest(tokens: int, budget: int) -> None:
    ids, seen = observed(tokens)
    if tokens <= budget:
        expected = everything(seen)
    else:
        sinks = min(4, budget // 4)
        newest = set(range(sinks)) | set(range(tokens - (budget - sinks), tokens))
        expected = every_head(seen, lambda layer, head: newest)
    assert kept("streaming", ids, budget) == expected


@given(tokens=LENGTHS, budget=BUDGETS, window=st.sampled_from([4, 8, 32]), pool=st.sampled_from([1, 3, 7]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_snapkv_keeps_what_the_window_looks_at(tokens: int, budget: int, window: int, pool: int) -> None:
    ids, seen = observed(tokens)
    first, last = naive.sinks_and_window(budget, tokens, window=window)

    def choose(layer: int, head: int) -> set[int]:
        scores = naive.snapkv_scores(seen, layer, head, window, pool)
        return naive.best(scores, budget - first - last, first, last)

    expected = everything(seen) if tokens <= budget else every_head(seen, choose)
    assert kept("snapkv", ids, budget, window=window, pool=pool) == expected


@given(tokens=LENGTHS, budget=BUDGETS)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_tova_keeps_what_the_newest_query_looks_at(tokens: int, budget: int) -> None:
    ids, seen = observed(tokens)

    def choose(layer: int, head: int) -> set[int]:
        return naive.best(naive.tova_scores(seen, layer), budget - 1, 0, 1)

    assert kept("tova", ids, budget) == (everything(seen) if tokens <= budget else every_head(seen, choose))


@given(tokens=LENGTHS, budget=BUDGETS)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_knorm_keeps_the_smallest_keys(tokens: int, budget: int) -> None:
    ids, seen = observed(tokens)
    first, last = naive.sinks_and_window(budget, tokens, window=8)

    def choose(layer: int, head: int) -> set[int]:
        return naive.best(naive.knorm_scores(seen, layer, head), budget - first - last, first, last)

    assert kept("knorm", ids, budget) == (everything(seen) if tokens <= budget else every_head(seen, choose))


@given(tokens=LENGTHS, budget=BUDGETS, alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]), pool=st.sampled_from([1, 7]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_adakv_lets_heads_compete(tokens: int, budget: int, alpha: float, pool: int) -> None:
    ids, seen = observed(tokens)
    first, last = naive.sinks_and_window(budget, tokens, window=8)
    found = kept("adakv", ids, budget, alpha=alpha, pool=pool, window=8)
    if tokens <= budget:
        assert found == everything(seen)
        return
    for layer in range(len(seen.maps)):
        scores = [naive.snapkv_scores(seen, layer, head, 8, pool) for head in range(seen.kv_heads)]
        counts = naive.adakv_counts(scores, budget, first, last, alpha)
        assert [len(head) - first - last for head in found[layer]] == counts
        for head, count in enumerate(counts):
            assert found[layer][head] == naive.best(scores[head], count, first, last)


@given(tokens=LENGTHS, budget=BUDGETS, beta=st.sampled_from([1.0, 2.0, 20.0]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_pyramidkv_gives_early_layers_more(tokens: int, budget: int, beta: float) -> None:
    ids, seen = observed(tokens)
    first, last = naive.sinks_and_window(budget, tokens)
    found = kept("pyramidkv", ids, budget, beta=beta)
    if tokens <= budget:
        assert found == everything(seen)
        return
    line = naive.pyramid_line(budget - first - last, tokens - first - last, len(seen.maps), beta)
    chosen = [{len(head) - first - last for head in heads} for heads in found]
    assert all(len(layer) == 1 for layer in chosen)
    counts = [layer.pop() for layer in chosen]
    assert all(abs(count - exact) < 1 for count, exact in zip(counts, line, strict=True))
    assert sum(counts) == len(counts) * (budget - first - last)
    for layer, count in enumerate(counts):
        for head in range(seen.kv_heads):
            scores = naive.snapkv_scores(seen, layer, head)
            assert found[layer][head] == naive.best(scores, count, first, last)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_is_that_of_the_prompt(share: float) -> None:
    ids, _ = observed(120)
    for method in ("streaming", "snapkv", "tova", "knorm"):
        assert {len(head) for heads in kept(method, ids, share) for head in heads} == {round(share * 120)}


def test_the_naive_formulas_by_hand() -> None:
    assert naive.maximum_of_neighbours([1, 5, 2, 0, 0, 3], 3) == [5, 5, 5, 2, 3, 3]
    assert naive.best([9, 1, 4, 4, 2, 0], 1, 1, 1) == {0, 3, 5}
    assert naive.best([9, 1, 4, 4, 2, 0], 2, 1, 1) == {0, 2, 3, 5}
    # Both heads may choose 2; the first has the 3 best of all, and half of what there is is shared evenly.
    scores = [[0.9, 0.8, 0.7, 0.1], [0.2, 0.3, 0.0, 0.0]]
    assert naive.adakv_counts(scores, 2, 0, 0, 0.0) == [3, 1]
    assert naive.adakv_counts(scores, 2, 0, 0, 1.0) == [2, 2]
    assert naive.adakv_counts(scores, 2, 0, 0, 0.5) == [3, 1]
