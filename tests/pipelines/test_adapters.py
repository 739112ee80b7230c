# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from headkv_mm.pipelines import models as adapters
from headkv_mm.pipelines.models.base import Sampling
from headkv_mm.pipelines.models.llamagen import LlamaGenAdapter
from headkv_mm.pipelines.text_to_image import TextToImagePipeline


class Elephant(LlamaGenAdapter):
    architecture = "Elephant"

    @classmethod
    def recognises(cls, config: Any) -> bool:
        return getattr(config, "model_type", None) == "gpt2"


def test_registering_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", [LlamaGenAdapter])
    with pytest.raises(ValueError, match="no adapter"):
        adapters.adapter_class_for(GPT2Config())
    assert adapters.register_adapter(Elephant) is Elephant
    adapters.register_adapter(Elephant)
    assert adapters.architectures() == ["LlamaGen", "Elephant"]
    assert adapters.adapter_class_for(GPT2Config()) is Elephant


def test_an_adapter_is_a_class_of_adapters() -> None:
    with pytest.raises(TypeError, match="subclass of ImageModelAdapter"):
        adapters.register_adapter(dict)  # type: ignore[arg-type]


def test_settings_come_from_the_call_then_from_the_model(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model.generation_config, "top_k", 7)
    settings = LlamaGenAdapter(tiny_model).effective_sampling(Sampling(temperature=0.5))
    assert settings == Sampling(guidance_scale=1.0, do_sample=True, temperature=0.5, top_k=7, top_p=1.0)


def test_prompts_are_padded_on_the_left(pipe: TextToImagePipeline) -> None:
    encoded = pipe._adapter.encode(["red circle top on white", "red circle top, blue ring left on white"])
    mask = encoded.inputs["attention_mask"]
    assert mask.shape == (2, 15)
    assert encoded.condition_lengths.tolist() == [7, 11] == mask.sum(1).tolist()
    assert mask[0].tolist() == [0] * 8 + [1] * 7


def _letters(size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<pad>": 30, **{chr(97 + i): 31 + i for i in range(size)}}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def test_another_tokenizer_reads_prompts_as_they_stand(tiny_model: Any) -> None:
    pipe = TextToImagePipeline(model=tiny_model, tokenizer=_letters(20), device="cpu")
    out = pipe("a b c", seed=0)
    assert out.prompts == ["a b c"]
    assert not torch.equal(out.tokens, pipe("c b a", seed=0).tokens)
    with pytest.raises(ValueError, match="prompt has 16 tokens, this model reads at most 15"):
        pipe("a " * 16)


def test_a_model_without_a_tokenizer(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headkv_mm.demo.tokenizer.WORDS", ("one", "word"))
    with pytest.raises(ValueError, match="came without a tokenizer: pass tokenizer="):
        TextToImagePipeline(model=tiny_model, device="cpu")
