# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TextStreamer

import headkv_mm
from headkv_mm.pipelines import KVTextGenerationPipeline, TextReport

LONG = "a river runs through the warm valley and nobody knows its code. " * 3
SHORT = "the code of the warm river is 2998."
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def stock(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    return transformers.pipeline("text-generation", tiny_llama, tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture(scope="module")
def ours(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> KVTextGenerationPipeline:
    pipe = headkv_mm.pipeline(
        "text-generation",
        tiny_llama,
        tokenizer=tiny_tokenizer,
        device="cpu",
        kv_compression="snapkv",
        kv_budget=32,
    )
    assert isinstance(pipe, KVTextGenerationPipeline)
    return pipe


def _report(pipe: KVTextGenerationPipeline) -> TextReport:
    assert pipe.report is not None
    return pipe.report


@pytest.mark.parametrize("settings", [{"kv_compression": None}, {"kv_budget": 1.0}], ids=["full cache", "budget 1"])
def test_output_is_that_of_the_stock_pipeline(
    stock: Any, ours: KVTextGenerationPipeline, settings: dict[str, Any]
) -> None:
    for arguments in (
        {},
        {"return_full_text": False},
        {"num_return_sequences": 2, "num_beams": 3},
        {"return_tensors": True},
        {"stop_sequence": "e"},
    ):
        arguments = {**GREEDY, **arguments}
        assert ours([LONG, SHORT], batch_size=2, **arguments, **settings) == stock(
            [LONG, SHORT], batch_size=2, **arguments
        )
    assert ours(SHORT, **GREEDY, **settings) == stock(SHORT, **GREEDY)
    chat = [{"role": "user", "content": "hello"}]
    stock.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    try:
        assert ours(chat, **GREEDY, **settings) == stock(chat, **GREEDY)
    finally:
        stock.tokenizer.chat_template = None


def test_compression_holds_less_and_is_reported(ours: KVTextGenerationPipeline) -> None:
    out = ours(LONG, **GREEDY)
    report = _report(ours)
    assert out[0]["generated_text"].startswith(LONG)
    assert (report.method, report.budget, report.rows, report.runs) == ("snapkv", 32, 1, 1)
    assert report.nbytes < report.nbytes_full / 2
    assert report.prompt_tokens == len(LONG) + 1
    assert 1 <= report.tokens <= 12
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    assert max(length for layer in report.caches[0].lengths for row in layer for length in row) < 100
    assert report.to_dict()["ratio"] == report.ratio
    assert "snapkv 32 per head" in str(report)


def test_full_cache_is_measured(ours: KVTextGenerationPipeline) -> None:
    ours(SHORT, **GREEDY, kv_compression=None, min_new_tokens=12)
    report = _report(ours)
    entries = len(SHORT) + 1 + 12 - 1  # the last token is not stored
    assert report.nbytes == report.nbytes_full == 2 * 2 * 2 * 8 * 4 * entries  # layers, heads, k and v, D, float32
    assert (report.method, report.budget, report.tokens) == ("none", None, 12)


def test_rows_of_a_padded_batch_are_the_prompts_alone(ours: KVTextGenerationPipeline) -> None:
    alone = [ours(prompt, **GREEDY) for prompt in (LONG, SHORT)]
    assert ours([LONG, SHORT], batch_size=2, **GREEDY) == alone
    assert (_report(ours).rows, _report(ours).runs) == (2, 1)
    assert ours([LONG, SHORT], batch_size=1, **GREEDY) == alone
    assert (_report(ours).rows, _report(ours).runs) == (2, 2)


def test_sequences_and_beams(ours: KVTextGenerationPipeline) -> None:
    out = ours(LONG, max_new_tokens=12, do_sample=False, num_beams=4, num_return_sequences=2)
    assert len(out) == 2
    assert _report(ours).rows == 2
    torch.manual_seed(0)
    out = ours(LONG, max_new_tokens=12, do_sample=True, num_return_sequences=3)
    assert len({record["generated_text"] for record in out}) > 1


def test_a_call_overrides_the_pipeline(ours: KVTextGenerationPipeline) -> None:
    ours(LONG, **GREEDY, kv_budget=64)
    assert (_report(ours).method, _report(ours).budget) == ("snapkv", 64)
    ours(LONG, **GREEDY, kv_compression="streaming")
    assert (_report(ours).method, _report(ours).budget) == ("streaming", 32)
    ours(LONG, **GREEDY)
    assert (_report(ours).method, _report(ours).budget) == ("snapkv", 32)


def test_streamer(ours: KVTextGenerationPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    out = ours(LONG, **GREEDY, streamer=TextStreamer(ours.tokenizer, skip_prompt=True), return_full_text=False)
    assert capsys.readouterr().out.rstrip("\n") == out[0]["generated_text"]


def test_a_generator_is_consumed_lazily(stock: Any, ours: KVTextGenerationPipeline) -> None:
    taken = []

    def prompts() -> Iterator[str]:
        for prompt in (SHORT, LONG, SHORT):
            taken.append(prompt)
            yield prompt

    next(iter(stock(prompts(), **GREEDY)))
    if len(taken) == 3:
        pytest.skip("the stock pipeline of this transformers reads the whole generator first")
    taken.clear()
    out = ours(prompts(), **GREEDY)
    next(iter(out))
    assert len(taken) < 3
    assert _report(ours).runs == 1


def test_the_model_is_as_before(stock: Any, ours: KVTextGenerationPipeline) -> None:
    implementation = ours.model.config._attn_implementation
    before = stock(LONG, **GREEDY)
    ours(LONG, **GREEDY)
    assert stock(LONG, **GREEDY) == before
    assert ours.model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_compression": "snapvk"}, "unknown method 'snapvk'"),
        ({"kv_compression": "lines"}, "lines"),
        ({"kv_budget": 1.5}, "outside"),
        ({"kv_options": {"no_such": 1}}, "no option 'no_such'"),
    ],
)
def test_bad_arguments(ours: KVTextGenerationPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(LONG, **GREEDY, **arguments)


def test_no_prompts(ours: KVTextGenerationPipeline) -> None:
    with pytest.raises(ValueError, match="empty list of prompts"):
        ours([])


def test_from_a_folder(tiny_llama_folder: Path, ours: KVTextGenerationPipeline) -> None:
    pipe = headkv_mm.pipeline("text-generation", tiny_llama_folder, kv_compression="snapkv", kv_budget=32, device="cpu")
    assert pipe(LONG, **GREEDY) == ours(LONG, **GREEDY)


@pytest.mark.parametrize("made_up", [None, "Qwen2TokenizerFast"])
def test_a_folder_without_tokenizer(tiny_llama: LlamaForCausalLM, made_up: str | None, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    if made_up is not None:  # a class that transformers makes without a vocabulary
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": made_up}))
    with pytest.raises(ValueError, match="no tokenizer that can be read") as caught:
        headkv_mm.pipeline("text-generation", tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_no_such_folder() -> None:
    with pytest.raises(ValueError, match="no such folder"):
        headkv_mm.pipeline("text-generation", "/no/such/folder")


def test_the_embedded_model_is_the_default(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headkv_mm.demo.text_model_path", lambda: tiny_llama_folder)
    assert headkv_mm.pipeline("text-generation", device="cpu").model.name_or_path == str(tiny_llama_folder)
