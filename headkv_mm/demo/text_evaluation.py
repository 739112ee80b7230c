# SPDX-License-Identifier: Apache-2.0
"""How many questions about unseen documents the embedded language model answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.demo.documents import Document, make_document, prompt_text, score_answer
from headkv_mm.demo.text_rows import token_ids
from headkv_mm.demo.text_tokenizer import build_text_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GATE_TASKS: tuple[str, ...] = (
    *("single", "multi-key", "multi-value", "multi-query", "variable-tracking", "list", "two-turn"),
)
LENGTHS: tuple[int, ...] = (512, 1024, 2048)


def unseen_documents(task: str, length: int, count: int, seed: int) -> list[Document]:
    """Documents with names that training never uses, for the embedded model's tokenizer."""
    rng = random.Random(f"{task} {length} {seed}")
    return [make_document(task, rng, length, lambda text: len(token_ids(text)) + 1) for _ in range(count)]


@torch.no_grad()
def would_answer(model: LlamaForCausalLM, documents: list[Document], rows: int = 4) -> float:
    """Share of last questions whose right answer, word by word, is what the model finds most likely.

    That is when greedy decoding writes exactly this answer; one forward pass is enough to know.
    """
    tokenizer, right = build_text_tokenizer(), 0
    for first in range(0, len(documents), rows):
        part = documents[first : first + rows]
        prompts = [prompt_text(item, len(item.questions) - 1) for item in part]
        replies = [[*token_ids(item.questions[-1].reply), tokenizer.eos_token_id] for item in part]
        batch = [[tokenizer.bos_token_id, *token_ids(text), *reply] for text, reply in zip(prompts, replies)]
        longest = max(len(row) for row in batch)
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch])
        best = model(ids, use_cache=False).logits.argmax(-1)
        for row, (tokens, reply) in enumerate(zip(batch, replies)):
            right += best[row, len(tokens) - len(reply) - 1 : len(tokens) - 1].tolist() == reply
    return right / len(documents)


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, documents: list[Document], rows: int = 16) -> list[list[str]]:
    """Answers of stock `generate` to all questions of each document, each turn after the model's own earlier ones."""
    tokenizer = build_text_tokenizer()
    answers: list[list[str]] = []
    for first in range(0, len(documents), rows):
        part = documents[first : first + rows]
        given: list[list[str]] = [[] for _ in part]
        for turn in range(len(part[0].questions)):
            prompts = [prompt_text(item, turn, replies) for item, replies in zip(part, given)]
            inputs = tokenizer(prompts, padding=True, return_tensors="pt")
            limit = max(len(token_ids(item.questions[turn].reply)) for item in part) + 24
            output = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for replies, text in zip(given, texts):
                replies.append(text)
        answers += given
    return answers


def exact_share(documents: list[Document], answers: list[list[str]]) -> float:
    """Share of documents whose questions were all answered with all values, in their order."""
    right = sum(
        all(score_answer(question, answer) == 1 for question, answer in zip(document.questions, replies, strict=True))
        for document, replies in zip(documents, answers, strict=True)
    )
    return right / len(documents)


def evaluate_text_model(
    model: LlamaForCausalLM,
    documents: int = 256,
    seeds: tuple[int, ...] = (1, 2, 3),
    lengths: tuple[int, ...] = LENGTHS,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Greedy exact match with the full cache on unseen documents.

    Args:
        model: any Llama with the embedded model's tokenizer.
        documents: documents for every length and seed, spread evenly over `GATE_TASKS`.
        seeds: seeds of the documents.
        lengths: tokens of the longest prompt.
        report: called with one line per result.

    Returns:
        JSON data: for every length and seed the share over all documents and by task.
    """
    results = []
    for length in lengths:
        for seed in seeds:
            right, by_task = 0.0, {}
            for place, task in enumerate(GATE_TASKS):
                count = documents // len(GATE_TASKS) + (place < documents % len(GATE_TASKS))
                if not count:
                    continue
                drawn = unseen_documents(task, length, count, seed)
                by_task[task] = exact_share(drawn, greedy_answers(model, drawn))
                right += by_task[task] * count
            results.append({"length": length, "seed": seed, "exact": right / documents, "tasks": by_task})
            report(f"{length} tokens, seed {seed}: {results[-1]['exact']:.3f} {by_task}")
    return {"documents": documents, "decoding": "greedy", "cache": "full", "results": results}
