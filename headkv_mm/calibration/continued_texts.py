# SPDX-License-Identifier: Apache-2.0
"""Texts to calibrate on of which one knows how they go on: what is read first, and what is predicted then."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from headkv_mm.calibration.texts import calibration_texts
from headkv_mm.demo.documents import make_document, question_text
from headkv_mm.evaluation.text.tokens import Encoder

_TASK = "mixed"


@dataclass(frozen=True)
class ContinuedText:
    """One text.

    Attributes:
        read: tokens of what is read, and compressed, first.
        following: tokens of what follows.
        counted: which of the following tokens a loss counts; never the first, which nothing compressed predicts.
    """

    read: tuple[int, ...]
    following: tuple[int, ...]
    counted: tuple[bool, ...]


def continued_texts(
    tokenizer: Any, *, texts: int, length: int, following: int, seed: int, text: str | None
) -> list[ContinuedText]:
    """Texts to read.

    Args:
        tokenizer: the model's.
        texts: how many.
        length: tokens of each; of generated ones those of the document with one question, and the other questions
            come on top.
        following: how many tokens at the end of a piece of `text` follow; all of them count.
        seed: chooses the generated ones.
        text: what they are cut from, one after the other; None for generated documents of facts, after which questions
            about them follow, of whose answers the tokens count. Their names are those of no evaluation.

    Raises:
        ValueError: if the texts cannot be made.
    """
    if text is None:
        return [_generated(tokenizer, random.Random(f"tables {seed} {index}"), length) for index in range(texts)]
    cut = calibration_texts(tokenizer, texts=texts, length=length, seed=seed, text=text, label="tables")
    counted = (False, *[True] * (following - 1))
    return [ContinuedText(tuple(ids[:-following]), tuple(ids[-following:]), counted) for ids in cut]


def _generated(tokenizer: Any, rng: random.Random, length: int) -> ContinuedText:
    """A document with all its questions and their answers."""
    encoder = Encoder(tokenizer)
    document = make_document(_TASK, rng, length, encoder.count, held_out=False)
    following: list[int] = []
    counted: list[bool] = []
    for question in document.questions:
        for part, counts in ((question_text(question.text), False), (f" {question.reply}", True)):
            ids = encoder.following(part)
            following += ids
            counted += [counts] * len(ids)
    return ContinuedText(tuple(encoder.document(document.text)), tuple(following), tuple(counted))
