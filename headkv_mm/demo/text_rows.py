# SPDX-License-Identifier: Apache-2.0
"""Training rows of the embedded language model: packed documents with many questions, and repeats to begin with."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from headkv_mm.demo.documents import sentences as make
from headkv_mm.demo.documents.document import question_text
from headkv_mm.demo.documents.sentences import Needle, Question, Supply
from headkv_mm.demo.documents.tasks import scatter
from headkv_mm.demo.documents.words import draw_names
from headkv_mm.demo.text_tokenizer import BOS, EOS, PAD, TOKENS

VALUE_WEIGHT, REPLY_WEIGHT, TEXT_WEIGHT = 1.0, 0.3, 0.05
SHORTEST_ROW = 128
MOST_LISTS = 8  # in a document of lists only, so that not all items come in several of them
KINDS = ("number", "joint", "values", "chain", "list", "route", "frequent")
_IDS = {token: index for index, token in enumerate(TOKENS)}
_SPLIT = re.compile(r"[a-z]+|[0-9]|[.,?:]")


@dataclass(frozen=True)
class Row:
    """One training row of T tokens.

    Attributes:
        inputs: what the model reads.
        targets: what should follow each token; not always the next input, because answers end with `<eos>`.
        weights: of the loss; `VALUE_WEIGHT` marks the values of answers.
        asking: where the first question begins; T without questions.
        spare: True for tokens of the document that no answer needs.
    """

    inputs: list[int]
    targets: list[int]
    weights: list[float]
    asking: int
    spare: list[bool]


def token_ids(text: str) -> list[int]:
    """Ids of a text of the closed vocabulary, as the tokenizer gives them, without special tokens."""
    return [_IDS[piece] for piece in _SPLIT.findall(text.lower())]


def repeats_row(rng: random.Random, length: int) -> Row:
    """A random segment that returns after random gaps.

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
    return Row(tokens[:length], tokens[1 : length + 1], weights[1 : length + 1], length, [False] * length)


def document_row(rng: random.Random, length: int, mix: dict[str, float]) -> Row:
    """A document with facts of one or more kinds, then questions and answers.

    Args:
        rng: source of randomness.
        length: tokens of the row; shorter rows end with padding of weight zero.
        mix: relative frequency of each of `KINDS`.

    Raises:
        ValueError: if the row is too short for every kind of question.
    """
    if length < SHORTEST_ROW:
        raise ValueError(f"a row with a document has at least {SHORTEST_ROW} tokens, asked for {length}")
    kinds = list(mix)
    if rng.random() < 0.5:  # a document of one kind, as in the evaluation
        kinds = [rng.choices(kinds, [mix[kind] for kind in kinds])[0]]
    names, supply = iter(draw_names(rng, 400, held_out=False)), Supply(rng)
    facts, asked = length * rng.uniform(0.12, 0.5), length * rng.uniform(0.1, 0.5)
    if kinds == ["list"]:
        facts = min(facts, MOST_LISTS * 18)
    needles: list[Needle] = []
    questions: list[Question] = []
    told = said = 0
    while told < facts or not questions:
        group, question = _draw(supply, rng.choices(kinds, [mix[kind] for kind in kinds])[0], names, length)
        size = sum(len(token_ids(sentence)) for needle in group for sentence in needle.sentences)
        turn = len(_turn(question)[0])
        if told + size + said + turn + 1 > length:
            if questions:
                break
            continue  # too long to be the only one: draw another
        needles += group
        told += size
        if said + turn <= asked or not questions:
            questions.append(question)
            said += turn
    rng.shuffle(questions)
    parts = scatter(rng, tuple(needle.sentences for needle in needles), _fillers(rng, length - told - said - 1))
    return _row(length, parts, questions)


def _row(length: int, parts: list[str], questions: list[Question]) -> Row:
    """Put the sentences of a document and its questions together."""
    needed = {sentence for question in questions for sentence in question.evidence}
    inputs, spare = [_IDS[BOS]], [False]
    for part in parts:
        ids = token_ids(part)
        inputs += ids
        spare += [part not in needed] * len(ids)
    asking = len(inputs)
    targets = [*inputs[1:], _IDS["question"]]
    weights = [TEXT_WEIGHT] * (asking - 1) + [0.0]
    for question in questions:
        turn = _turn(question)
        inputs, targets, weights = inputs + turn[0], targets + turn[1], weights + turn[2]
    rest = length - len(inputs)
    spare += [False] * (length - asking)
    return Row(inputs + [_IDS[PAD]] * rest, targets + [_IDS[PAD]] * rest, weights + [0.0] * rest, asking, spare)


def _fillers(rng: random.Random, room: int) -> list[str]:
    """Filler for at most `room` tokens."""
    fillers: list[str] = []
    while room > 0:
        sentence = make.filler(rng)
        room -= len(token_ids(sentence))
        if room >= 0:
            fillers.append(sentence)
    return fillers


def _draw(supply: Supply, kind: str, names: Iterator[str], length: int) -> tuple[list[Needle], Question]:
    """Needles of one kind and the question about all of them."""
    rng = supply.rng

    def take(count: int) -> list[str]:
        return [next(names) for _ in range(count)]

    if kind == "joint":
        needles = [make.number_needle(supply, name) for name in take(rng.randint(2, 4))]
        return needles, make.joint_question(needles)
    if kind == "frequent":
        needle = make.frequent_word_needle(rng, rng.randint(6, max(6, min(40, length // 16))))
    elif kind == "route":
        needle = make.route_needle(supply, take(rng.randint(2, max(2, min(64, length // 50)))))
    elif kind == "chain":
        needle = make.chain_needle(supply, *take(2))
    else:
        builders = {"number": make.number_needle, "values": make.values_needle, "list": make.list_needle}
        needle = builders[kind](supply, *take(1))
    return [needle], needle.question


def _turn(question: Question) -> tuple[list[int], list[int], list[float]]:
    """Inputs, targets and weights of a question with its answer; the end of the answer is a target only."""
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
