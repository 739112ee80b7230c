# SPDX-License-Identifier: Apache-2.0
"""Texts to calibrate on: pieces of the user's own, or generated ones. Never those of an evaluation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from headkv_mm.calibration.prompts import needle_prompt

_DEPTHS = 10


def calibration_texts(
    tokenizer: Any, *, texts: int, length: int, seed: int, text: str | None, label: str
) -> list[Sequence[int]]:
    """Tokens of every text.

    Args:
        tokenizer: the model's.
        texts: how many.
        length: tokens of each; of generated ones, about.
        seed: chooses the generated ones.
        text: what they are cut from, one after the other; None for generated ones, each with a question at its end.
        label: of the calibration, so that no two read the same generated texts.

    Raises:
        ValueError: if they cannot be cut from `text`.
    """
    if text is None:
        return [
            needle_prompt(
                tokenizer, random.Random(f"{label} {seed} {index}"), length, index % _DEPTHS / (_DEPTHS - 1)
            ).ids
            for index in range(texts)
        ]
    ids: list[int] = tokenizer(text)["input_ids"]
    needed = texts * length
    if len(ids) < needed:
        raise ValueError(
            f"the text has {len(ids)} tokens, and {texts} texts of {length} need {needed}: give a longer one, or ask "
            "for fewer or shorter texts"
        )
    return [ids[first : first + length] for first in range(0, needed, length)]


def identity_of(text: str | None) -> list[Any] | None:
    """What tells two texts apart, as JSON types: the length and a hash; None for generated texts."""
    return None if text is None else [len(text), hashlib.sha256(text.encode()).hexdigest()[:16]]


def check_positions(model: Any, length: int) -> None:
    """Refuse texts that are longer than what a model was made for.

    Raises:
        ValueError: if they are.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"the model was made for {most} positions, and the texts have {length}: use a shorter length")
