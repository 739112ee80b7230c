# SPDX-License-Identifier: Apache-2.0
"""Models whose layers lie in several places: the same output, and nothing is widened or taken for its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import headkv_mm
from headkv_mm.devices import input_device, is_offloaded, layer_devices
from headkv_mm.llamagen import LlamaGenForConditionalGeneration

LONG = "a river runs through the warm valley and nobody knows its code. " * 2
PROMPT = "a red circle top left on white"
CPU = torch.device("cpu")


def on_disk(prefix: str) -> dict[str, str]:
    """The first weights and the second layer on disk, so that `model.device` is none where anything is computed."""
    parts = {"norm": "cpu", "rotary_emb": "cpu", "embed_tokens": "disk", "layers.0": "cpu", "layers.1": "disk"}
    return {"lm_head": "cpu", **{f"{prefix}.{name}": place for name, place in parts.items()}}


@pytest.mark.parametrize("method", ["headkv", "adakv"])
def test_text_with_layers_on_disk(
    method: str, tiny_llama: LlamaForCausalLM, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"kv_compression": method, "kv_budget": 24, "kv_options": {"interval": 8}}
    arguments = {"do_sample": False, "max_new_tokens": 16}
    expected = headkv_mm.pipeline("text-generation", tiny_llama_folder, device="cpu", **settings)(LONG, **arguments)
    pipe = headkv_mm.pipeline(
        "text-generation",
        tiny_llama_folder,
        device_map=on_disk("model"),
        model_kwargs={"offload_folder": tmp_path},
        **settings,
    )
    assert is_offloaded(pipe.model)
    assert pipe(LONG, **arguments) == expected
    assert pipe.report.nbytes < pipe.report.nbytes_full / 2
    assert (
        headkv_mm.pipeline("text-generation", tiny_llama_folder, device_map="auto", **settings)(LONG, **arguments)
        == expected
    )


@pytest.mark.parametrize("method", ["headkv", "adakv"])
def test_images_with_layers_on_disk(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kv_compression": method, "kv_budget": 0.5, "seed": 3}
    expected = headkv_mm.pipeline("text-to-image", tiny_folder, device="cpu", **settings)(PROMPT)
    places = {**on_disk("model.language_model"), "patch_decoder": "cpu", "model.positions": "cpu"}
    pipe = headkv_mm.pipeline(
        "text-to-image",
        tiny_folder,
        device_map=places,
        model_kwargs={"offload_folder": tmp_path},
        **settings,
    )
    assert is_offloaded(pipe.model)
    output = pipe(PROMPT)
    assert torch.equal(output.tokens, expected.tokens)
    assert output.images[0].tobytes() == expected.images[0].tobytes()


def test_questions_about_a_document_with_layers_on_disk(tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kv_compression": "snapkv", "kv_budget": 24}
    places = {"device_map": on_disk("model"), "model_kwargs": {"offload_folder": tmp_path}}
    task = "long-document-question-answering"
    expected = headkv_mm.pipeline(task, tiny_llama_folder, device="cpu", **settings).read(text=LONG)
    document = headkv_mm.pipeline(task, tiny_llama_folder, **places, **settings).read(text=LONG)
    asked: dict[str, Any] = {"max_new_tokens": 8}
    answer = document.ask("what runs?", **asked).text
    assert answer == expected.ask("what runs?", **asked).text
    document.save(tmp_path / "notes.kv")
    again = headkv_mm.pipeline(task, tiny_llama_folder, **places, **settings).load(tmp_path / "notes.kv")
    assert {layer.store.keys.device for layer in again.cache.compressed_layers} == {CPU}
    assert again.ask("what runs?", **asked).text == answer


def test_offloaded_half_precision_is_not_widened(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    half = LlamaForCausalLM(tiny_llama.config)
    half.load_state_dict(tiny_llama.state_dict())
    half.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer.save_pretrained(tmp_path / "half")
    loading: dict[str, Any] = {"kv_compression": "snapkv", "kv_budget": 24}
    whole = headkv_mm.pipeline("text-generation", tmp_path / "half", device_map="auto", **loading)
    some = headkv_mm.pipeline(
        "text-generation",
        tmp_path / "half",
        device_map=on_disk("model"),
        model_kwargs={"offload_folder": tmp_path},
        **loading,
    )
    if not torch.cuda.is_available():
        assert {weight.dtype for weight in whole.model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in some.model.parameters()} == {torch.bfloat16}
    assert some("ab", max_new_tokens=1)[0]["generated_text"].startswith("ab")


def test_where_a_model_computes(tiny_model: LlamaGenForConditionalGeneration, tiny_folder: Path) -> None:
    assert input_device(tiny_model) == CPU
    assert layer_devices(tiny_model) == {0: CPU, 1: CPU}
    offloaded = cpu_offload(LlamaGenForConditionalGeneration.from_pretrained(tiny_folder), CPU)
    assert offloaded.device.type == "meta"
    assert input_device(offloaded) == CPU
    assert layer_devices(offloaded) == {0: CPU, 1: CPU}
    assert is_offloaded(offloaded) and not is_offloaded(tiny_model)


def test_a_loaded_model_is_not_mapped_again(tiny_llama: LlamaForCausalLM, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="loaded already"):
        headkv_mm.pipeline("text-generation", tiny_llama, tokenizer=tiny_tokenizer, device_map="auto")


def test_a_device_is_heeded_among_several_processes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        pipe = headkv_mm.pipeline("text-generation", tiny_llama_folder, device="meta")
        assert pipe.device.type == pipe.model.device.type == "meta"
        assert headkv_mm.pipeline("text-generation", tiny_llama_folder, device=-1).device == CPU
    finally:
        distributed.destroy_process_group()
