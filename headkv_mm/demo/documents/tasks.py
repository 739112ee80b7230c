# SPDX-License-Identifier: Apache-2.0
"""Kinds of tasks, and documents of a given length for them.

The kinds follow RULER (Hsieh et al., arXiv:2404.06654): needles in a haystack, variable tracking and frequent words;
"two-turn" and "long-generation" are for caches that are compressed before a second question, or while answering.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from headkv_mm.demo.documents import sentences as make
from headkv_mm.demo.documents.document import Document, prompt_text
from headkv_mm.demo.documents.sentences import Needle, Question, Supply
from headkv_mm.demo.documents.words import draw_names

CountTokens = Callable[[str], int]
MAX_NEEDLES = 64  # names are limited, and more needles than this make a document no harder
_TRIES = 40


@dataclass(frozen=True)
class _Hay:
    """What a task hides: sentences in order of appearance for each needle, and what is asked."""

    needles: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


def _share(length: int, per_needle: int, share: float, least: int) -> int:
    """How many needles of `per_needle` words fill a share of a document."""
    return max(least, min(MAX_NEEDLES, int(length * share) // per_needle))


def _numbers(rng: random.Random, count: int, held_out: bool) -> list[Needle]:
    supply = Supply(rng)
    return [make.number_needle(supply, name) for name in draw_names(rng, count, held_out)]


def _hay(needles: list[Needle], *questions: Question) -> _Hay:
    return _Hay(tuple(needle.sentences for needle in needles), questions)


def _single(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needles = _numbers(rng, 1, held_out)
    return _hay(needles, needles[0].question)


def _multi_key(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needles = _numbers(rng, _share(words, 12, 0.5, 4), held_out)
    return _hay(needles, needles[0].question)


def _multi_value(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needle = make.values_needle(Supply(rng), draw_names(rng, 1, held_out)[0])
    return _hay([needle], needle.question)


def _multi_query(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needles = _numbers(rng, _share(words, 12, 0.3, 4), held_out)
    return _hay(needles, make.joint_question(needles[: rng.randint(2, 4)]))


def _variable_tracking(rng: random.Random, words: int, held_out: bool) -> _Hay:
    count = _share(words, 24, 0.3, 2)
    names, supply = draw_names(rng, 2 * count, held_out), Supply(rng)
    needles = [make.chain_needle(supply, *names[2 * index : 2 * index + 2]) for index in range(count)]
    return _hay(needles, needles[0].question)


def _list(rng: random.Random, words: int, held_out: bool) -> _Hay:
    names, supply = draw_names(rng, min(8, _share(words, 18, 0.2, 2)), held_out), Supply(rng)
    needles = [make.list_needle(supply, name) for name in names]
    return _hay(needles, needles[0].question)


def _frequent_words(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needle = make.frequent_word_needle(rng, _share(words, 5, 0.3, 6))
    return _hay([needle], needle.question)


def _two_turn(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needles = _numbers(rng, _share(words, 12, 0.3, 4), held_out)
    return _hay(needles, needles[0].question, needles[1].question)


def _long_generation(rng: random.Random, words: int, held_out: bool) -> _Hay:
    needle = make.route_needle(Supply(rng), draw_names(rng, _share(words, 17, 0.6, 3), held_out))
    return _hay([needle], needle.question)


def _mixed(rng: random.Random, words: int, held_out: bool) -> _Hay:
    """Facts of all kinds, one question about each kind and a second about a number."""
    names = iter(draw_names(rng, 60, held_out))
    supply = Supply(rng)
    count = min(16, _share(words, 12, 0.12, 2))
    numbers = [make.number_needle(supply, next(names)) for _ in range(count)]
    several = [make.values_needle(supply, next(names)) for _ in range(2)]
    chains = [make.chain_needle(supply, next(names), next(names)) for _ in range(2)]
    lists = [make.list_needle(supply, next(names)) for _ in range(2)]
    route = make.route_needle(supply, [next(names) for _ in range(_share(min(words, 1024), 100, 1.0, 3))])
    asked = [numbers[0], several[0], chains[0], lists[0], numbers[1], route]
    joint = make.joint_question(numbers[-2:])
    return _hay([*numbers, *several, *chains, *lists, route], *(needle.question for needle in asked), joint)


_BUILDERS: dict[str, Callable[[random.Random, int, bool], _Hay]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": _multi_query,
    "variable-tracking": _variable_tracking,
    "list": _list,
    "frequent-words": _frequent_words,
    "two-turn": _two_turn,
    "long-generation": _long_generation,
    "mixed": _mixed,
}
TASKS: tuple[str, ...] = tuple(task for task in _BUILDERS if task != "mixed")  # "mixed" is for showing, not scoring
DEPTH_TASKS: tuple[str, ...] = ("single", "multi-key")


def scatter(rng: random.Random, needles: tuple[tuple[str, ...], ...], fillers: list[str]) -> list[str]:
    """Mix needles into filler; the sentences of one needle keep their order."""
    slots = [index for index, needle in enumerate(needles) for _ in needle] + [-1] * len(fillers)
    rng.shuffle(slots)
    sources = [*(iter(needle) for needle in needles), iter(fillers)]
    return [next(sources[index]) for index in slots]


def make_document(
    task: str,
    rng: random.Random,
    length: int,
    count_tokens: CountTokens,
    *,
    depth: float | None = None,
    held_out: bool = True,
) -> Document:
    """Make a document of a given length.

    Args:
        task: one of `TASKS`, or "mixed" for facts and questions of all kinds but frequent words.
        rng: source of randomness; equal states give equal documents.
        length: tokens of the longest prompt, with the right answers to earlier questions. It has at most this many, and
            not more than 32 or a twentieth (whichever is larger) fewer.
        count_tokens: the tokenizer's count for a text, special tokens included.
        depth: 0.0 puts what is asked for at the beginning, 1.0 at the end; None anywhere. For `DEPTH_TASKS` only.
        held_out: use names that the embedded model was not trained on.

    Raises:
        ValueError: if the task or depth is unknown, or the length cannot be met.
    """
    if task not in _BUILDERS:
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}")
    if depth is not None and task not in DEPTH_TASKS:
        raise ValueError(f"the depth can be set for {' and '.join(DEPTH_TASKS)} only, not for {task}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")
    tolerance = max(32, length // 20)
    words = length  # for tokenizers that need more than one token a word, corrected below
    fillers = [make.filler(rng) for _ in range(4)]
    for _ in range(_TRIES):
        hay = _BUILDERS[task](rng, words, held_out)
        while True:
            document = _assemble(task, rng, hay, fillers, depth)
            tokens = count_tokens(_longest_prompt(document))
            if tokens > length or tokens >= length - tolerance:
                break
            per_filler = max(1.0, count_tokens(" ".join(fillers)) / len(fillers))
            fillers += [make.filler(rng) for _ in range(max(1, int((length - tokens - tolerance / 2) / per_filler)))]
        if tokens <= length:
            return document
        needed = count_tokens(_longest_prompt(_assemble(task, rng, hay, [], None)))
        if needed > length - tolerance:
            words = int(words * min(0.9, length / needed * 0.9))
        if words < 8:
            break
        fillers = fillers[: int(len(fillers) * 0.8)] or [make.filler(rng)]
    raise ValueError(f"no {task} document of {length} tokens came out: ask for a longer one")


def _longest_prompt(document: Document) -> str:
    """The prompt of a second turn holds the first one; the questions of a mixed document are asked one by one."""
    if document.task == "mixed":
        return max((prompt_text(document, turn, []) for turn in range(len(document.questions))), key=len)
    return prompt_text(document, len(document.questions) - 1)


def _assemble(task: str, rng: random.Random, hay: _Hay, fillers: list[str], depth: float | None) -> Document:
    """Put needles and filler together."""
    needles = hay.needles
    if task == "two-turn":
        parts = _apart(rng, needles, fillers)
    elif depth is None:
        parts = scatter(rng, needles, fillers)
    else:
        parts = scatter(rng, needles[1:], fillers)
        place = round(depth * len(parts))
        parts[place:place] = needles[0]
    facts = {sentence for needle in needles for sentence in needle}
    told = tuple(sentence for sentence in parts if sentence in facts)
    return Document(task, " ".join(parts), told, hay.questions)


def _apart(rng: random.Random, needles: tuple[tuple[str, ...], ...], fillers: list[str]) -> list[str]:
    """The first two needles in different halves, the rest anywhere."""
    parts = scatter(rng, needles[2:], fillers)
    half = len(parts) // 2
    first, second = (needles[0], needles[1]) if rng.random() < 0.5 else (needles[1], needles[0])
    late = rng.randint(half, len(parts))
    parts[late:late] = second
    early = rng.randint(0, half)
    parts[early:early] = first
    return parts
