# SPDX-License-Identifier: Apache-2.0
"""laprox against the formula written with whole attention maps and whole projected values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from headkv_mm import HeadKVCache, plan_memory
from headkv_mm.output_projections import OutputProjections

from . import naive_selection as naive
from .test_outside_check import kept, observed, stock_model
from .tiny_llama import tiny_llama


def naive_kept(tokens: int, budget: int, ids: torch.Tensor, window: int = 32) -> list[list[set[int]]]:
    """One top-K over all layers and heads, in float64."""
    model, (_, seen) = stock_model(), observed(tokens)
    heads, size = model.config.num_attention_heads, model.config.head_dim
    group = heads // seen.kv_heads
    values = [layer.values[0].double() for layer in _values(model, ids)]
    first, last = naive.sinks_and_window(budget, tokens, window=window)
    found = []
    for layer, maps in enumerate(seen.maps):
        weight = model.model.layers[layer].self_attn.o_proj.weight.detach().double()  # [hidden, H * D]
        scores = torch.zeros(seen.kv_heads, tokens, dtype=torch.float64)
        for h in range(heads):
            rows = torch.tensor(maps[h], dtype=torch.float64)[-window:]
            projected = values[layer][h // group] @ weight[:, h * size : (h + 1) * size].T  # [T, hidden]
            scores[h // group] += rows.norm(dim=0) * projected.norm(dim=-1) / group
        smooth = torch.stack([scores[:, max(at - 3, 0) : at + 4].mean(-1) for at in range(tokens)], dim=-1)
        found.append(smooth / smooth.sum())
    free = len(found) * seen.kv_heads * (budget - first - last)
    ranked = sorted(
        (
            (float(found[layer][g, at].float()), at, -layer, -g)
            for layer in range(len(found))
            for g in range(seen.kv_heads)
            for at in range(first, tokens - last)
        ),
        reverse=True,
    )[:free]
    protected = set(range(first)) | set(range(tokens - last, tokens))
    result = [[set(protected) for _ in range(seen.kv_heads)] for _ in found]
    for _, at, layer, g in ranked:
        result[-layer][-g].add(at)
    return result


def _values(model: Any, ids: torch.Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache.layers


@pytest.mark.parametrize(("tokens", "budget"), [(64, 12), (97, 30), (130, 20), (130, 70), (50, 49)])
def test_the_best_over_all_layers_stay(tokens: int, budget: int) -> None:
    ids, _ = observed(tokens)
    found = kept("laprox", ids, budget, candidates=9)  # nothing is dropped early
    assert found == naive_kept(tokens, budget, ids)
    assert sum(len(head) for layer in found for head in layer) == 3 * 3 * budget


def test_no_layer_holds_more_than_its_candidates_while_it_waits() -> None:
    """What is held between two forwards, and of what was read: budget times candidates, not the prompt."""
    model = tiny_llama(8, 4, 2, 16)
    cache = HeadKVCache(model, "laprox", budget=0.05, candidates=4)
    with torch.no_grad():
        model(torch.randint(0, 8, (1, 1200)), past_key_values=cache)
    full = plan_memory(model, None, tokens=1200).nbytes_full
    assert cache.nbytes_peak < 0.6 * full
    assert cache.nbytes < 0.16 * full  # 5 % of the entries, bookkeeping, and 8 KiB of Gram matrices per layer


def test_projected_norms_are_those_of_the_vectors() -> None:
    model = tiny_llama(2, 6, 3, 8)
    cache = HeadKVCache(model, "laprox", budget=16, scope="layer", window=4)
    with torch.no_grad():
        model(torch.randint(0, 8, (2, 40)), past_key_values=cache)
    store = cache.compressed_layers[1].store
    assert store is not None
    norms = OutputProjections(model).norms(store, 1)
    weight = model.model.layers[1].self_attn.o_proj.weight.detach()
    for b in range(2):
        for g in range(3):
            slots = slice(int(store.start[b, g]), int(store.start[b, g] + store.length[b, g]))
            for r in range(2):
                h = 2 * g + r
                expected = (store.values[slots] @ weight[:, 8 * h : 8 * h + 8].T).norm(dim=-1)
                torch.testing.assert_close(norms[slots, r], expected, rtol=1e-4, atol=1e-5)


def test_gpt2_has_its_weights_the_other_way_round() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=20)).eval()
    gram = OutputProjections(model).grams(0, 8)
    weight = model.transformer.h[0].attn.c_proj.weight.detach()  # [in, out]
    torch.testing.assert_close(gram[1], weight[8:16] @ weight[8:16].T)


def test_what_cannot_be_read_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ValueError, match=r"needs the output projections of the model.*HeadKVCache\(model"):
        HeadKVCache(config, "laprox", budget=16)
    model = tiny_llama(1, 2, 1, 8)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="offloaded or quantized"):
        OutputProjections(empty).grams(0, 8)
