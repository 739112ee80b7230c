# SPDX-License-Identifier: Apache-2.0
"""Language models of other families: softcap, learned sinks, sliding layers, fused projections, learned positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from headkv_mm import HeadKVCache

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "Qwen3": ({**COMMON, "head_dim": 16}, "sdpa"),
    "Mistral": ({**COMMON, "sliding_window": None}, "sdpa"),
    "Gemma2": ({**COMMON, **SLIDING}, "eager"),
    "Gemma3Text": ({**COMMON, **SLIDING}, "sdpa"),
    "GptOss": ({**COMMON, **SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1}, "eager"),
    "GPT2": (
        {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        "sdpa",
    ),
    "Phi3": (COMMON, "sdpa"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_text_of_another_family(family: str) -> None:
    torch.manual_seed(0)
    settings, implementation = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(5, 120, (2, 50), generator=torch.Generator().manual_seed(0))
    stock, whole = DynamicCache(config=model.config), HeadKVCache(model, "snapkv", budget=200)
    # The prompt's attention is the stock one; within the budget so is, nearly, every later token's.
    prompt = model(ids, past_key_values=stock).logits
    assert torch.equal(model(ids, past_key_values=whole).logits, prompt)
    for index in range(10):
        token = ids[:, index : index + 1]
        expected = model(token, past_key_values=stock).logits
        assert (model(token, past_key_values=whole).logits - expected).abs().max() < 1e-4
    for method in ("headkv", "adakv", "r-kv"):
        cache = HeadKVCache(model, method, budget=20)
        model(ids, past_key_values=cache)
        slow = cache.copy(evict=False)
        at_once = model(ids[:, :9], past_key_values=cache).logits
        one_by_one = [model(ids[:, index : index + 1], past_key_values=slow).logits for index in range(9)]
        assert (torch.cat(one_by_one, 1) - at_once).abs().max() < 1e-3
        assert {int(layer.store.length.sum()) for layer in cache.compressed_layers} == {2 * 20 * layer_heads(model)}


def layer_heads(model: Any) -> int:
    """KV heads of a layer."""
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
