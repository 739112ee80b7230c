# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import headkv_mm
from headkv_mm.pipelines import Document, LongDocumentQAPipeline
from headkv_mm.pipelines.registration import LONG_DOCUMENT_QA

TEXT = "a river runs through the warm valley and nobody knows its code. " * 6
QUESTIONS = ["what is the code?", "who knows?", "where does it run, and why?"]


@pytest.fixture(scope="module")
def qa(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> LongDocumentQAPipeline:
    pipe = headkv_mm.pipeline(
        LONG_DOCUMENT_QA,
        tiny_llama,
        tokenizer=tiny_tokenizer,
        device="cpu",
        kv_compression="snapkv",
        kv_budget=0.25,
        max_new_tokens=10,
    )
    assert isinstance(pipe, LongDocumentQAPipeline)
    return pipe


@pytest.fixture(scope="module")
def doc(qa: LongDocumentQAPipeline) -> Document:
    return qa.read(text=TEXT)


def _content(doc: Document) -> list[bytes]:
    """Every byte that the document's cache holds."""
    return [
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for layer in doc.cache.compressed_layers
        for tensor in (layer.compressor.tensors if layer.compressor is not None else (layer.keys, layer.values))
    ]


def _stock(qa: LongDocumentQAPipeline, question: str, tokens: int = 10) -> str:
    inputs = qa.tokenizer(f"{TEXT.strip()}\n\nQuestion: {question}\nAnswer:", return_tensors="pt")
    made = qa.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return qa.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_full_cache_gives_what_plain_generation_gives(qa: LongDocumentQAPipeline) -> None:
    for settings in ({"kv_compression": None}, {"kv_budget": 1.0}):
        full = qa.read(text=TEXT, **settings)
        assert [answer.text for answer in full.ask(QUESTIONS)] == [_stock(qa, question) for question in QUESTIONS]
        assert full.report.nbytes == pytest.approx(full.report.nbytes_full, rel=1e-3)
        assert full.report.kept == full.report.tokens


def test_chunks_make_no_difference(qa: LongDocumentQAPipeline, doc: Document) -> None:
    small = qa.read(text=TEXT, chunk_size=50)
    for layer, other in zip(small.kept_positions(), doc.kept_positions()):
        assert all(torch.equal(head, same) for head, same in zip(layer, other))
    assert [answer.text for answer in small.ask(QUESTIONS)] == [answer.text for answer in doc.ask(QUESTIONS)]


def test_compressing_every_chunk_bounds_memory(qa: LongDocumentQAPipeline, doc: Document) -> None:
    small = qa.read(text=TEXT, chunk_size=64, compress_chunks=True, kv_budget=64)
    assert small.report.kept == pytest.approx(64, abs=1)
    at_once = qa.read(text=TEXT, chunk_size=64, kv_budget=64)
    assert at_once.report.nbytes_peak >= at_once.report.nbytes_full
    assert small.report.nbytes_peak < 0.5 * small.report.nbytes_full
    assert small.ask(QUESTIONS[0]).text
    full = qa.read(text=TEXT, chunk_size=64, compress_chunks=True, kv_compression=None)
    assert full.ask(QUESTIONS[0]).text == _stock(qa, QUESTIONS[0])
    with pytest.raises(TypeError, match="compress_chunks must be True or False"):
        qa.read(text=TEXT, compress_chunks=3)


def test_a_question_does_not_change_the_document(doc: Document) -> None:
    before = _content(doc)
    forwards = [answer.text for answer in doc.ask(QUESTIONS)]
    backwards = [answer.text for answer in doc.ask(QUESTIONS[::-1])]
    assert forwards == backwards[::-1]
    assert doc.ask(QUESTIONS[1]).text == forwards[1]
    assert _content(doc) == before
    assert len(set(forwards)) > 1


def test_what_is_reported(doc: Document) -> None:
    report = doc.report
    assert (report.method, report.budget, report.query_aware, report.question) == ("snapkv", 0.25, False, None)
    assert report.tokens == len(doc.ids) == len(TEXT.strip()) + 1 + 2
    assert report.kept == pytest.approx(0.25 * report.tokens, rel=0.05)
    assert report.nbytes < 0.4 * report.nbytes_full
    assert report.known_words == report.words == 72
    answer = doc.ask(QUESTIONS[0], min_new_tokens=5)
    assert answer.question == QUESTIONS[0]
    assert 5 <= answer.tokens <= 10
    assert report.nbytes < answer.nbytes < answer.nbytes_full
    assert (answer.kept, answer.document_tokens) == (report.kept, report.tokens)
    assert answer.seconds_to_first_token > 0 and answer.tokens_per_second
    assert not answer.query_aware
    json.dumps([answer.to_dict(), report.to_dict()])
    assert "snapkv 1/4" in str(report)


def test_complete_answers(doc: Document) -> None:
    assert not doc.ask(QUESTIONS[0], max_new_tokens=3, min_new_tokens=3).complete
    first = doc.ids[0]
    answer = doc.ask(QUESTIONS[0], forced_eos_token_id=2, max_new_tokens=3)
    assert answer.complete
    assert first == doc.ids[0]


def test_streaming(doc: Document) -> None:
    whole = doc.ask(QUESTIONS[0], max_new_tokens=40)
    stream = doc.ask(QUESTIONS[0], max_new_tokens=40, stream=True)
    with pytest.raises(RuntimeError, match="not complete"):
        stream.answer  # noqa: B018
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.answer.text


def test_leaving_a_stream_ends_the_generation(doc: Document) -> None:
    with doc.ask(QUESTIONS[0], max_new_tokens=500, min_new_tokens=500, stream=True) as stream:
        next(stream)
    assert not stream._thread.is_alive()
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="not complete"):
        stream.answer  # noqa: B018


def test_an_error_reaches_the_reader_of_a_stream(doc: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(doc, "_answer", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(doc.ask(QUESTIONS[0], stream=True))


def test_query_aware(qa: LongDocumentQAPipeline, doc: Document) -> None:
    aware = qa.read(text=TEXT, query_aware=True, question=QUESTIONS[0])
    assert aware.report.query_aware and aware.report.question == QUESTIONS[0]
    assert "knowing the question" in str(aware.report)
    answer = aware.ask()
    assert answer.query_aware
    assert aware.ask(QUESTIONS[0]).text == answer.text
    with pytest.raises(ValueError, match="compressed for the question 'what is the code"):
        aware.ask(QUESTIONS[1])
    full = qa.read(text=TEXT, query_aware=True, question=QUESTIONS[0], kv_compression=None)
    assert full.ask().text == _stock(qa, QUESTIONS[0])
    with pytest.raises(ValueError, match="query_aware=True needs question"):
        qa.read(text=TEXT, query_aware=True)
    with pytest.raises(ValueError, match="say query_aware=True"):
        qa.read(text=TEXT, question="why?")
    with pytest.raises(TypeError, match="needs a question"):
        doc.ask()


@pytest.mark.parametrize("aware", [False, True])
def test_save_and_load(qa: LongDocumentQAPipeline, tmp_path: Path, aware: bool) -> None:
    doc = qa.read(text=TEXT, query_aware=aware, question=QUESTIONS[0] if aware else None)
    doc.save(tmp_path / "a.kv")
    again = qa.load(tmp_path / "a.kv")
    assert again.report == doc.report
    assert again.ids == doc.ids
    assert again.ask(QUESTIONS[0]).text == doc.ask(QUESTIONS[0]).text
    assert [path.name for path in tmp_path.iterdir()] == ["a.kv"]


def test_saved_documents_that_are_refused(qa: LongDocumentQAPipeline, doc: Document, tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    doc.save(path)
    other = LlamaForCausalLM(qa.model.config)
    for model, tokenizer, message in (
        (other, qa.tokenizer, "model"),
        (qa.model, copy.deepcopy(qa.tokenizer), "another tokenizer or chat template"),
    ):
        if tokenizer is not qa.tokenizer:
            tokenizer.chat_template = "{{ messages[0]['content'] }}!"
        pipe = LongDocumentQAPipeline(model=model, tokenizer=tokenizer, device="cpu")
        with pytest.raises(ValueError, match=message):
            pipe.load(path)
    data = path.read_bytes()
    for name, damaged in (("cut.kv", data[:-40]), ("empty.kv", b""), ("text.kv", b"no cache at all" * 20)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.kv") as caught:
            qa.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    doc.cache.save(tmp_path / "bare.kv", qa.model)
    with pytest.raises(ValueError, match="a cache but no document"):
        qa.load(tmp_path / "bare.kv")
    with pytest.raises(FileNotFoundError):
        qa.load(tmp_path / "none.kv")


def test_files(qa: LongDocumentQAPipeline, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.html").write_text("<p>another</p>")
    doc = qa.read(tmp_path / "a.txt")
    assert doc.report.names == (str(tmp_path / "a.txt"),)
    assert doc.ids == qa.read(text=TEXT).ids
    both = qa.read([tmp_path / "a.txt", str(tmp_path / "b.html")])
    assert "b.html\n\nanother" in qa.tokenizer.decode(both.ids)
    assert qa(tmp_path / "a.txt", QUESTIONS[0]).text == doc.ask(QUESTIONS[0]).text
    assert [answer.question for answer in qa({"text": TEXT, "questions": QUESTIONS})] == QUESTIONS


def test_too_long(qa: LongDocumentQAPipeline) -> None:
    with pytest.raises(ValueError, match=r"is 1103 tokens long and the model has 1024 positions.* 1177"):
        qa.read(text="a" * 1100)
    doc = qa.read(text="a" * 900)
    with pytest.raises(ValueError, match=r"is 903 tokens long and the model has 1024 positions: with 198 of the"):
        doc.ask("why" * 60)
    with pytest.raises(ValueError, match="and 200 for an answer"):
        doc.ask("why?", max_new_tokens=200)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": " \n"}, ValueError, "text is empty"),
        ({"text": 7}, TypeError, "text must be a str"),
        ({}, ValueError, "give files, or text"),
        ({"documents": [], "text": None}, ValueError, "no document"),
        ({"text": TEXT, "kv_compression": "snapvk"}, ValueError, "unknown method"),
        ({"text": TEXT, "kv_compression": "lines"}, ValueError, "lines"),
        ({"text": TEXT, "kv_budget": 0.0}, ValueError, "budget 0"),
        ({"text": TEXT, "chunk_size": 0}, ValueError, "chunk_size must be a positive"),
        ({"text": TEXT, "chunks": 3}, TypeError, "no argument 'chunks'.*chunk_size"),
    ],
)
def test_what_cannot_be_read(
    qa: LongDocumentQAPipeline, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qa.read(**arguments)


@pytest.mark.parametrize(
    ("question", "settings", "error", "message"),
    [
        (" ", {}, ValueError, "question is empty"),
        ("", {}, ValueError, "question is empty"),
        ([], {}, ValueError, "empty list of questions"),
        (["why?", ""], {}, ValueError, "question is empty"),
        ([7], {}, TypeError, "must be text, got int"),
        ("why?", {"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive"),
        ("why?", {"num_beams": 2}, ValueError, "num_beams must be 1"),
        ("why?", {"past_key_values": None}, TypeError, "no argument 'past_key_values'"),
        (["why?"], {"stream": True}, ValueError, "for one question"),
    ],
)
def test_what_cannot_be_asked(
    doc: Document, question: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        doc.ask(question, **settings)


def test_sampling(doc: Document) -> None:
    torch.manual_seed(0)
    first = [doc.ask(QUESTIONS[0], do_sample=True, temperature=1.5).text for _ in range(3)]
    torch.manual_seed(0)
    assert [doc.ask(QUESTIONS[0], do_sample=True, temperature=1.5).text for _ in range(3)] == first
    assert len(set(first)) > 1


def test_a_model_that_samples_by_default_is_greedy_here(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, doc: Document
) -> None:
    model = copy.deepcopy(tiny_llama)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    pipe = LongDocumentQAPipeline(
        model=model, tokenizer=tiny_tokenizer, device="cpu", kv_compression="snapkv", max_new_tokens=10
    )
    assert pipe.read(text=TEXT, kv_budget=0.25).ask(QUESTIONS[0]).text == doc.ask(QUESTIONS[0]).text


def test_tokenizers_that_do_not_fit(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_tokens(["one more"])
    with pytest.raises(ValueError, match="do not belong together"):
        LongDocumentQAPipeline(model=tiny_llama, tokenizer=larger, device="cpu")
    with pytest.raises(ValueError, match="there is none: pass tokenizer"):
        LongDocumentQAPipeline(model=tiny_llama, tokenizer=None, device="cpu")
    endless, model = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_llama)
    endless.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="has an end-of-text token"):
        LongDocumentQAPipeline(model=model, tokenizer=endless, device="cpu")


def test_factory(tiny_llama_folder: Path, doc: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headkv_mm.demo.text_model_path", lambda: tiny_llama_folder)
    for pipe in (
        headkv_mm.pipeline(LONG_DOCUMENT_QA, device="cpu", kv_budget=0.25),
        transformers.pipeline(LONG_DOCUMENT_QA, device="cpu", kv_compression="snapkv", kv_budget=0.25),
    ):
        assert isinstance(pipe, LongDocumentQAPipeline)
        again = pipe.read(text=TEXT)
        assert again.ids == doc.ids
    with pytest.raises(ValueError, match="unknown method"):
        headkv_mm.pipeline(LONG_DOCUMENT_QA, "/no/such/folder", kv_compression="snapvk")
    with pytest.raises(TypeError, match="no argument 'temperature'"):
        headkv_mm.pipeline(LONG_DOCUMENT_QA, device="cpu", temperature=2)


@pytest.mark.parametrize(
    "method", [n for n in headkv_mm.methods("text") if n not in ("headkv-r2", "compresskv", "compilerkv")]
)
def test_every_method_reads_answers_and_saves(qa: LongDocumentQAPipeline, tmp_path: Path, method: str) -> None:
    doc = qa.read(text=TEXT, kv_compression=method, kv_budget=64, chunk_size=100)
    before = _content(doc)
    answers = [answer.text for answer in doc.ask(QUESTIONS)]
    assert _content(doc) == before
    assert doc.report.kept == (doc.report.tokens if method == "none" else pytest.approx(64, abs=1))
    doc.save(tmp_path / "a.kv")
    assert [answer.text for answer in qa.load(tmp_path / "a.kv").ask(QUESTIONS[::-1])] == answers[::-1]


def test_a_method_that_needs_a_head_table_says_so(qa: LongDocumentQAPipeline) -> None:
    with pytest.raises(ValueError, match="no head table for this model"):
        qa.read(text=TEXT, kv_compression="headkv-r2")
