# SPDX-License-Identifier: Apache-2.0
"""The embedded language model as it ships."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from headkv_mm.demo import text_model_path
from headkv_mm.demo.documents import Document, make_document, prompt_text
from headkv_mm.demo.documents.examples import make_example
from headkv_mm.demo.text_evaluation import GATE_TASKS, exact_share, greedy_answers, unseen_documents, would_answer
from headkv_mm.demo.text_tokenizer import TOKENS


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(text_model_path()).eval()


def test_it_is_a_small_stock_llama(model: Any) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert model.num_parameters() < 2_500_000
    folder = text_model_path()
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    assert "auto_map" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_its_tokenizer_is_the_closed_vocabulary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_model_path())
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == list(TOKENS)
    assert tokenizer.padding_side == "left"


def mixed_documents(seed: int) -> list[Document]:
    return [unseen_documents(GATE_TASKS[index % len(GATE_TASKS)], 512, 1, seed + index)[0] for index in range(16)]


def test_it_answers_unseen_documents(model: Any) -> None:
    documents = mixed_documents(5000)
    right = sum(exact_share([item], greedy_answers(model, [item])) for item in documents)
    assert right >= 0.8 * len(documents)


def test_it_reads_the_document_and_does_not_guess(model: Any) -> None:
    """The same questions about other documents: the answers are wrong."""
    documents = [unseen_documents("single", 300, 1, seed)[0] for seed in range(8)]
    others = [
        make_document("single", random.Random(seed), 300, lambda text: len(text.split()) * 2) for seed in range(8)
    ]
    swapped = [
        Document(item.task, other.text, other.facts, item.questions)
        for item, other in zip(documents, others, strict=True)
    ]
    assert would_answer(model, documents) > 0.8
    assert exact_share(swapped, greedy_answers(model, swapped)) == 0


def test_one_pass_tells_what_greedy_decoding_writes(model: Any) -> None:
    documents = [unseen_documents("multi-key", 256, 1, seed)[0] for seed in range(8)]
    answers = greedy_answers(model, documents, rows=8)
    written = [reply[0] == item.questions[0].reply.lower() for item, reply in zip(documents, answers, strict=True)]
    assert would_answer(model, documents) == sum(written) / len(written)


def test_left_padding_changes_no_answer(model: Any) -> None:
    short, long = unseen_documents("single", 200, 1, 1)[0], unseen_documents("single", 400, 1, 2)[0]
    alone = [greedy_answers(model, [item])[0] for item in (short, long)]
    assert greedy_answers(model, [short, long]) == alone


def test_it_answers_the_examples(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_model_path())
    document = make_example("notes-500")
    prompts = [prompt_text(document, turn, []) for turn in range(len(document.questions))]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=160)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text == item.reply.lower() for text, item in zip(texts, document.questions, strict=True)]
    assert sum(right) >= len(right) - 1
