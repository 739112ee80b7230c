# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm.fingerprint import fingerprint

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1))


def test_a_step_of_training_changes_it() -> None:
    model = small_model()
    before = fingerprint(model)
    assert fingerprint(small_model()) == before
    assert fingerprint(small_model().to(torch.bfloat16).float().to(torch.bfloat16)) == fingerprint(
        small_model().to(torch.bfloat16)
    )
    with torch.no_grad():
        model.lm_head.weight += 0.01
    assert fingerprint(model) != before


@pytest.mark.parametrize("place", ["memory", "disk", "both"])
def test_weights_that_accelerate_has_moved_out(place: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    model, device = small_model(), torch.device("cpu")
    before = fingerprint(model)
    if place == "memory":
        cpu_offload(model, execution_device=device)
    elif place == "disk":
        disk_offload(model, str(tmp_path), execution_device=device)
    else:
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
        dispatch_model(model, {**places, "model.rotary_emb": "cpu"}, main_device="cpu", offload_dir=str(tmp_path))
    assert any(weight.is_meta for weight in model.parameters())
    assert fingerprint(model) == before


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(ValueError, match="has no values: load the model"):
        fingerprint(model)
