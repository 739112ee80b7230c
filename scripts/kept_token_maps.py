#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate one image and read one document with several methods, write which entries every head kept, and draw it.

The embedded models run for about a minute. results.json holds everything that the pictures show, so they can be drawn
again without any model: `python scripts/head_type_page.py`.

Example:
    python scripts/kept_token_maps.py --output benchmarks/results/kept_tokens
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept_token_plots import draw_all

from headkv_mm.budgets import parse_budget
from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.demo.documents import Document, make_document, question_text, score_answer
from headkv_mm.demo.parsing import score
from headkv_mm.demo.patches import tokens_to_image
from headkv_mm.demo.scenes import GRID_SIZE, Scene, caption, unseen_scenes
from headkv_mm.evaluation.origin import commit, versions
from headkv_mm.evaluation.prompts import encode
from headkv_mm.evaluation.runner import open_model
from headkv_mm.evaluation.settings import FIRST_EVICTION_OPTIONS, image_options
from headkv_mm.evaluation.storage import read_json, write_json
from headkv_mm.evaluation.text.answering import Reader, stop_tokens
from headkv_mm.evaluation.text.runner import open_text_model
from headkv_mm.evaluation.text.tokens import Encoder, Tokens

IMAGE_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("headkv", {}),
    ("adakv", {}),
    ("logit-spread", {}),
    ("pointed", {}),
)
TEXT_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("keydiff", {}),
    ("headkv-r2", {"scorer": "keydiff"}),
    ("pointed", {}),
)
FIRST_EVICTION_ROWS = 4
ANSWER_TOKENS = 48
TASK = "multi-query"
CAPTIONS_TO_CHOOSE_FROM = 64


def image_part(
    model: Any, methods: Sequence[tuple[str, Mapping[str, Any]]], budget: Any, *, seed: int, rows: int
) -> dict[str, Any]:
    """The image of one unseen caption with most shapes, and what every method held of it after so many rows."""
    scene = max(unseen_scenes(CAPTIONS_TO_CHOOSE_FROM, seed), key=lambda scene: len(scene.objects))
    prompts = encode(model, [caption(scene)])
    start = int(prompts.mask.sum())
    found = []
    for method, options in methods:
        compression = Compression(method, budget=budget, **_first_eviction(method), **options)
        cache = HeadKVCache(model, compression)
        kept: list[list[list[int]]] = []

        def look(done: int, total: int, cache: HeadKVCache = cache, kept: list[Any] = kept) -> None:
            # The eviction after a row comes with the first token that follows it.
            if done == rows * GRID_SIZE + 1:
                kept += kept_from(cache, start)

        tokens = model.generate(prompts.ids, prompts.mask, seeds=[seed], past_key_values=cache, callback=look)
        right = drawn_right(scene, tokens[0].tolist())
        found.append(
            {"method": method, "options": dict(options), "tokens": tokens[0].tolist(), "right": right, "kept": kept}
        )
    return {"caption": caption(scene), "seed": seed, "budget": budget, "rows": rows, "methods": found}


def drawn_right(scene: Scene, tokens: Sequence[int]) -> bool:
    """Is everything in an image as its caption says?"""
    return bool(score(scene, tokens_to_image(np.asarray(tokens))).all_right)


def text_part(
    model: Any,
    tokenizer: Any,
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    budget: Any,
    *,
    seed: int,
    length: int,
) -> dict[str, Any]:
    """One document, compressed by every method before its question is known, and the answers."""
    encoder = Encoder(tokenizer)
    document = make_document(TASK, random.Random(f"kept tokens {seed}"), length, encoder.count)
    reader = Reader(model, stop_tokens(model, tokenizer))
    ids = encoder.document(document.text)
    question = document.questions[0]
    asked = encoder.following(question_text(question.text))
    found = []
    for method, options in methods:
        cache = HeadKVCache(model, Compression(method, budget=budget, **options))
        mask, _ = reader.read(cache, Tokens.padded([ids], encoder.pad, model.device))
        kept = kept_from(cache, 0)
        answering = cache.copy(evict=False)
        mask, scores = reader.read(answering, Tokens.padded([asked], encoder.pad, model.device), mask)
        (reply,) = reader.answer(answering, mask, scores, ANSWER_TOKENS)
        answer = encoder.decode(reply)
        right = score_answer(question, answer) == 1
        found.append({"method": method, "options": dict(options), "answer": answer, "right": right, "kept": kept})
    return {
        "task": TASK,
        "seed": seed,
        "budget": budget,
        "tokens": len(ids),
        "question": question.text,
        "reply": question.reply,
        "evidence": evidence_spans(document, tokenizer),
        "methods": found,
    }


def kept_from(cache: HeadKVCache, start: int) -> list[list[list[int]]]:
    """Positions of the first row by layer and KV head, counted from `start`; what lies before is left out."""
    return [
        [
            [position - start for position in head.tolist() if position >= start]
            for head in cache.kept_positions(layer)[0]
        ]
        for layer in range(len(cache.layers))
    ]


def evidence_spans(document: Document, tokenizer: Any) -> list[list[int]]:
    """First and last token of every value that the questions ask for, where the document says it.

    Raises:
        ValueError: if the document does not say it.
    """
    offsets = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    spans = []
    for question in document.questions:
        for sentence, value in zip(question.evidence, question.answers, strict=True):
            place = document.text.find(sentence)
            within = sentence.rfind(value)
            if place < 0 or within < 0:
                raise ValueError(f"the document does not say {value!r} in the sentence {sentence!r}")
            first, last = place + within, place + within + len(value)
            inside = [index for index, (low, high) in enumerate(offsets) if high > first and low < last and high > low]
            spans.append([inside[0], inside[-1]])
    return spans


def _first_eviction(method: str) -> dict[str, int]:
    """The option by which a method is told to evict first after as many rows as the others."""
    return {name: FIRST_EVICTION_ROWS for name in FIRST_EVICTION_OPTIONS if name in image_options(method)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both models, write results.json, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-budget", type=parse_budget, default=1 / 12)
    parser.add_argument("--text-budget", type=parse_budget, default=1 / 8)
    parser.add_argument("--image-seed", type=int, default=11)
    parser.add_argument("--text-seed", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="image rows after which to look")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the document with its question")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets results.json and the pictures")
    args = parser.parse_args(arguments)
    model, tokenizer = open_text_model(None, "cpu")
    text = text_part(model, tokenizer, TEXT_METHODS, args.text_budget, seed=args.text_seed, length=args.length)
    images = image_part(open_model(None, "cpu"), IMAGE_METHODS, args.image_budget, seed=args.image_seed, rows=args.rows)
    origin = {"versions": versions(), "commit": commit()}
    write_json(args.output / "results.json", {"format": 1, "origin": origin, "images": images, "text": text})
    draw_all(read_json(args.output / "results.json"), args.output)


if __name__ == "__main__":
    main()
