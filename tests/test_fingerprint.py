# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, LlamaConfig, LlamaForCausalLM

from headkv_mm.demo import image_model_path, text_model_path
from headkv_mm.fingerprint import fingerprint

ROOT = Path(__file__).parents[1]
EMBEDDED = {
    "language": (AutoModelForCausalLM, text_model_path, "c355d131d2269877"),
    "text_to_image": (AutoModelForMultimodalLM, image_model_path, "787db66964676e69"),
}
"""Committed results and tables say these."""
OF_OTHERS = {"images_without_forgetting", "images_deep", "heads_images_deep", "allocation_held_out_deep"}
"""Results of an image model that was trained in another way, or is twice as deep."""
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}


def small_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}, num_attention_heads=2, num_key_value_heads=1))


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_models(name: str) -> None:
    kind, folder, expected = EMBEDDED[name]
    model = kind.from_pretrained(folder())
    assert fingerprint(model) == expected
    assert fingerprint(kind.from_pretrained(folder(), dtype=torch.float16)) == expected
    digest = hashlib.sha256()  # over everything, and in no other order
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == expected


def test_committed_results_and_tables_are_of_the_embedded_models() -> None:
    known = {expected for _, _, expected in EMBEDDED.values()}
    stated = r'"(?:model|fingerprint)": "([0-9a-f]{16})"'
    found = [
        (path.parent.name, print_of_model)
        for folder in (ROOT / "benchmarks/results", text_model_path())
        for path in folder.rglob("*.json")
        for print_of_model in re.findall(stated, path.read_text(encoding="utf-8"))
    ]
    assert {print_of_model for folder, print_of_model in found if folder not in OF_OTHERS} == known
    assert not {print_of_model for folder, print_of_model in found if folder in OF_OTHERS} & known


def test_a_step_of_training_changes_it() -> None:
    model = small_model()
    before = fingerprint(model)
    assert fingerprint(small_model()) == before
    rounded = small_model().to(torch.bfloat16)
    assert fingerprint(rounded) != before
    assert fingerprint(small_model().to(torch.bfloat16).float()) == fingerprint(rounded)
    with torch.no_grad():
        model.lm_head.weight += 0.01
    assert fingerprint(model) != before


def test_of_a_large_tensor_a_sample_is_taken() -> None:
    model = torch.nn.Linear(1 << 11, (1 << 9) + 1, bias=False)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[::2] += 0.01  # as any training would
    assert fingerprint(model) != before
    with torch.no_grad():
        model.weight[:, 1] -= 0.01
    assert len({before, fingerprint(model), fingerprint(torch.nn.Linear(1 << 11, (1 << 9) + 1, bias=False))}) == 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["memory", "disk", "both"])
def test_weights_that_accelerate_has_moved_out(place: str, tied: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    model, device = small_model(tie_word_embeddings=tied), torch.device("cpu")
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
