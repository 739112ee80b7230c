# SPDX-License-Identifier: Apache-2.0
"""The embedded language model answers questions about the example documents that ship with the library."""

from __future__ import annotations

import pytest

import headkv_mm
from headkv_mm.demo.documents import score_answer
from headkv_mm.demo.documents.examples import ExampleDocument, example_documents, make_example
from headkv_mm.pipelines import LongDocumentQAPipeline

EXAMPLES = example_documents()


@pytest.fixture(scope="module")
def qa() -> LongDocumentQAPipeline:
    pipe = headkv_mm.pipeline("long-document-question-answering", device="cpu", kv_compression="none")
    assert isinstance(pipe, LongDocumentQAPipeline)
    return pipe


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_answers_are_those_of_plain_generation(qa: LongDocumentQAPipeline, example: ExampleDocument) -> None:
    text = example.document.read_text(encoding="utf-8").strip()
    doc = qa.read(example.document, chunk_size=300)
    assert doc.report.known_words == doc.report.words
    for question in example.questions.read_text(encoding="utf-8").splitlines()[:3]:
        inputs = qa.tokenizer(f"{text}\n\nQuestion: {question}\nAnswer:", return_tensors="pt")
        made = qa.model.generate(**inputs, max_new_tokens=60, do_sample=False)
        wanted = qa.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert doc.ask(question, max_new_tokens=60).text == wanted.strip()


def test_most_answers_are_right_and_come_from_the_document(qa: LongDocumentQAPipeline) -> None:
    from_document, from_another = [], []
    other = qa.read(text="The code of the low forge is 0000. A painter moved the rug near the wall.")
    for example in EXAMPLES:
        doc = qa.read(example.document)
        for question in make_example(example.name).questions:
            from_document.append(score_answer(question, doc.ask(question.text).text))
            from_another.append(score_answer(question, other.ask(question.text).text))
    assert sum(from_document) / len(from_document) > 0.8
    assert sum(from_another) / len(from_another) < 0.1


def test_a_quarter_of_the_cache_still_answers_by_default() -> None:
    pipe = headkv_mm.pipeline("long-document-question-answering", device="cpu")
    example = EXAMPLES[0]
    doc = pipe.read(example.document)
    assert (doc.report.method, doc.report.budget, doc.report.options) == ("pointed", 0.25, {})
    assert doc.report.nbytes < 0.27 * doc.report.nbytes_full
    scores = [score_answer(question, doc.ask(question.text).text) for question in make_example(example.name).questions]
    assert sum(scores) / len(scores) > 0.7


def test_three_quarters_of_the_cache_still_answer(qa: LongDocumentQAPipeline) -> None:
    example = EXAMPLES[0]
    doc = qa.read(example.document, kv_compression="snapkv", kv_budget=0.75)
    assert doc.report.nbytes < 0.85 * doc.report.nbytes_full
    questions = make_example(example.name).questions
    right = sum(score_answer(question, doc.ask(question.text).text) == 1 for question in questions)
    assert right >= 1
