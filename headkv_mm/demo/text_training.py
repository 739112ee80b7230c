# SPDX-License-Identifier: Apache-2.0
"""Training examples of the embedded language model: packed documents with many questions, and repeats to begin with."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch

from headkv_mm.demo.documents import sentences as make
from headkv_mm.demo.documents.document import question_text
from headkv_mm.demo.documents.sentences import Needle, Question
from headkv_mm.demo.documents.tasks import scatter
from headkv_mm.demo.documents.words import draw_names
from headkv_mm.demo.text_tokenizer import BOS, EOS, MAX_LENGTH, PAD, TOKENS

VALUE_WEIGHT, REPLY_WEIGHT, TEXT_WEIGHT = 1.0, 0.3, 0.05
KINDS = ("number", "joint", "values", "chain", "list", "route", "frequent")
_IDS = {token: index for index, token in enumerate(TOKENS)}
_SPLIT = re.compile(r"[a-z]+|[0-9]|[.,?:]")


@dataclass(frozen=True)
class TextBatch:
    """Rows of one length.

    Attributes:
        inputs: int64 [B, T].
        targets: int64 [B, T], what follows each token.
        weights: float32 [B, T] of the loss; `VALUE_WEIGHT` marks the values of answers.
        positions: int64 [1, T], rising, with or without jumps.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor


def token_ids(text: str) -> list[int]:
    """Ids of a text of the closed vocabulary, as the tokenizer gives them, without special tokens."""
    return [_IDS[piece] for piece in _SPLIT.findall(text.lower())]


def repeats_row(rng: random.Random, length: int) -> tuple[list[int], list[int], list[float]]:
    """A random segment that returns after random gaps: inputs, targets and weights.

    It teaches the model to look for what followed the last time, which is what answering is made of.
    """
    words = range(_IDS[BOS], len(TOKENS))
    segment = [rng.choice(words) for _ in range(rng.randint(6, 20))]
    tokens, weights = [_IDS[BOS]], [0.0]
    while len(tokens) <= length:
        gap = [rng.choice(words) for _ in range(rng.randint(0, 10))]
        seen = len(tokens) > len(segment)
        tokens += gap + segment
        weights += [0.0] * (len(gap) + 1) + [VALUE_WEIGHT if seen else 0.0] * (len(segment) - 1)
    return tokens[:length], tokens[1 : length + 1], weights[1 : length + 1]


def document_row(
    rng: random.Random, length: int, mix: dict[str, float], distinct: bool = False
) -> tuple[list[int], list[int], list[float]]:
    """A document with facts of one or more kinds, then questions and answers: inputs, targets and weights.

    Args:
        rng: source of randomness.
        length: tokens of the row; shorter rows end with padding of weight zero.
        mix: relative frequency of each of `KINDS`.
        distinct: no adjective or noun appears in two names, which is easier.
    """
    kinds = list(mix)
    if rng.random() < 0.5:  # a document of one kind, as in the evaluation
        kinds = [rng.choices(kinds, [mix[kind] for kind in kinds])[0]]
    names = iter(_names(rng, distinct))
    facts, asked = length * rng.uniform(0.15, 0.6), length * rng.uniform(0.2, 0.45)
    needles: list[Needle] = []
    turns: list[tuple[list[int], list[int], list[float]]] = []
    told = said = 0
    while told < facts or not turns:
        group, question = _draw(rng, rng.choices(kinds, [mix[kind] for kind in kinds])[0], names, length)
        size = sum(len(token_ids(sentence)) for needle in group for sentence in needle.sentences)
        turn = _turn(question)
        if told + size + said + len(turn[0]) + 1 > length:
            break
        needles += group
        told += size
        if said + len(turn[0]) <= asked or not turns:
            turns.append(turn)
            said += len(turn[0])
    rng.shuffle(turns)
    fillers: list[str] = []
    room = length - told - said - 1
    while room > 0:
        sentence = make.filler(rng)
        room -= len(token_ids(sentence))
        if room >= 0:
            fillers.append(sentence)
    text = token_ids(" ".join(scatter(rng, tuple(needle.sentences for needle in needles), fillers)))
    inputs = [_IDS[BOS], *text]
    targets = [*text, turns[0][0][0]] if turns else [*text, _IDS[EOS]]
    weights = [TEXT_WEIGHT] * len(text) + [0.0]
    for turn in turns:
        inputs, targets, weights = inputs + turn[0], targets + turn[1], weights + turn[2]
    rest = length - len(inputs)
    return inputs + [_IDS[PAD]] * rest, targets + [_IDS[PAD]] * rest, weights + [0.0] * rest


def _names(rng: random.Random, distinct: bool) -> list[str]:
    names = draw_names(rng, 320, held_out=False)
    if not distinct:
        return names
    chosen: list[str] = []
    used: set[str] = set()
    for name in names:
        if used.isdisjoint(name.split()):
            chosen.append(name)
            used.update(name.split())
    return chosen


def _draw(rng: random.Random, kind: str, names: object, length: int) -> tuple[list[Needle], Question]:
    """Needles of one kind and the question about all of them."""

    def take(count: int) -> list[str]:
        return [next(names) for _ in range(count)]  # type: ignore[call-overload]

    if kind == "joint":
        needles = [make.number_needle(rng, name) for name in take(rng.randint(2, 4))]
        return needles, make.joint_question(needles)
    if kind == "frequent":
        needle = make.frequent_word_needle(rng, rng.randint(6, max(6, min(40, length // 16))))
    elif kind == "route":
        needle = make.route_needle(rng, take(rng.randint(2, max(2, min(64, length // 50)))))
    elif kind == "chain":
        needle = make.chain_needle(rng, *take(2))
    else:
        builders = {"number": make.number_needle, "values": make.values_needle, "list": make.list_needle}
        needle = builders[kind](rng, *take(1))
    return [needle], needle.question


def _turn(question: Question) -> tuple[list[int], list[int], list[float]]:
    """A question with its answer; the answer is followed by the end, which is not part of the inputs."""
    prompt = token_ids(question_text(question.text))
    reply: list[int] = []
    weights: list[float] = []
    for sentence in question.evidence:
        ids = token_ids(sentence)
        verb = next(place for place, item in enumerate(ids) if item in (_IDS["is"], _IDS["calls"])) + 1
        reply += ids
        weights += [REPLY_WEIGHT] * verb + [VALUE_WEIGHT] * (len(ids) - verb)
    targets = [*prompt[1:], *reply, _IDS[EOS]]
    return prompt + reply, targets, [0.0] * (len(prompt) - 1) + weights + [VALUE_WEIGHT]


def positions_with_jumps(rng: random.Random, length: int, jumps: int) -> torch.Tensor:
    """Positions that skip some places, so that short rows teach long distances; int64 [1, length]."""
    steps = torch.ones(length, dtype=torch.long)
    steps[0] = 0
    free = MAX_LENGTH - length
    for _ in range(jumps):
        skip = rng.randint(0, max(0, free // jumps))
        steps[rng.randrange(1, length)] += skip
    return steps.cumsum(0)[None]


def text_batch(
    rng: random.Random, length: int, rows: int, mix: dict[str, float] | None, distinct: bool = False, jumps: int = 0
) -> TextBatch:
    """A batch of documents, or of repeats if `mix` is None."""
    drawn = [repeats_row(rng, length) if mix is None else document_row(rng, length, mix, distinct) for _ in range(rows)]
    inputs, targets, weights = (torch.tensor([row[part] for row in drawn]) for part in range(3))
    return TextBatch(inputs, targets, weights.float(), positions_with_jumps(rng, length, jumps))
