# SPDX-License-Identifier: Apache-2.0
"""Sentences of generated documents: filler, and needles with the questions they answer.

Every fact has the form "The RELATION of the NAME is VALUE.", and an answer repeats the sentences that hold it. The name
stands before the value, so that whoever reads on from the name finds the value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from headkv_mm.demo.documents import words


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        text: the question, with its question mark.
        answers: the values that a right answer holds, in this order.
        evidence: the sentences of the document that hold the values, in the order of the answer.
    """

    text: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...]

    @property
    def reply(self) -> str:
        """The answer in full sentences."""
        return " ".join(self.evidence)


@dataclass(frozen=True)
class Needle:
    """Sentences to hide in a document, in this order, and the question about them."""

    sentences: tuple[str, ...]
    question: Question


class Supply:
    """What the facts of one document draw from.

    No two numbers begin with the same two digits and no item is in two lists, as long as there are enough. So a value
    that was found by its name can be read to its end without looking at the name again.
    """

    def __init__(self, rng: random.Random) -> None:
        """Begin a document with a source of randomness."""
        self.rng = rng
        self._beginnings: list[int] = []
        self._items: list[str] = []

    def number(self) -> str:
        """Four digits."""
        if not self._beginnings:
            self._beginnings = self.rng.sample(range(100), 100)
        return f"{self._beginnings.pop():02d}{self.rng.randrange(100):02d}"

    def items(self, count: int) -> tuple[str, ...]:
        """Different items."""
        if len(self._items) < count:
            self._items = self.rng.sample(words.ITEMS, len(words.ITEMS))
        taken = tuple(self._items[:count])
        del self._items[:count]
        return taken


def fact(relation: str, name: str, value: str) -> str:
    """A sentence like "The code of the warm river is 2998."."""
    return f"The {relation} of the {name} is {value}."


def number_needle(supply: Supply, name: str) -> Needle:
    """One number of one thing."""
    relation, value = supply.rng.choice(words.RELATIONS)[0], supply.number()
    sentence = fact(relation, name, value)
    return Needle((sentence,), Question(f"What is the {relation} of the {name}?", (value,), (sentence,)))


def joint_question(needles: list[Needle]) -> Question:
    """One question that asks for what several `number_needle`s hold, in their order."""
    parts = [needle.question.text.removeprefix("What is ").removesuffix("?") for needle in needles]
    return Question(
        f"What is {' and '.join(parts)}?",
        tuple(value for needle in needles for value in needle.question.answers),
        tuple(sentence for needle in needles for sentence in needle.question.evidence),
    )


def values_needle(supply: Supply, name: str) -> Needle:
    """Two to four numbers of one thing: one for each day, from monday on."""
    days = words.DAYS[: supply.rng.randint(2, len(words.CARDINALS))]
    relation, plural = supply.rng.choice(words.RELATIONS)
    values = tuple(supply.number() for _ in days)
    sentences = tuple(fact(relation, f"{name} on {day}", value) for day, value in zip(days, values, strict=True))
    question = f"What are the {words.CARDINALS[len(days) - 1]} {plural} of the {name}?"
    return Needle(sentences, Question(question, values, sentences))


def chain_needle(supply: Supply, name: str, neighbour: str) -> Needle:
    """Two hops: one thing's neighbour, and a number of that neighbour; either may be told first."""
    relation, value = supply.rng.choice(words.RELATIONS)[0], supply.number()
    hops = (fact("neighbour", name, f"the {neighbour}"), fact(relation, neighbour, value))
    question = f"What is the {relation} of the neighbour of the {name}?"
    told = hops if supply.rng.random() < 0.5 else hops[::-1]
    return Needle(told, Question(question, (neighbour, value), hops))


def list_needle(supply: Supply, name: str) -> Needle:
    """A list of three to six different items."""
    items = supply.items(supply.rng.randint(3, 6))
    sentence = fact("list", name, ", ".join(items))
    return Needle((sentence,), Question(f"What is the list of the {name}?", items, (sentence,)))


def route_needle(supply: Supply, names: list[str]) -> Needle:
    """Numbers of many things, each with the name of the next one; the sentences come in any order."""
    values = tuple(supply.number() for _ in names)
    following = [*(f"the {name}" for name in names[1:]), "nothing"]
    route = tuple(
        fact("code", name, f"{value}, then {after}")
        for name, value, after in zip(names, values, following, strict=True)
    )
    question = Question(f"What are all codes of the route from the {names[0]}?", values, route)
    return Needle(tuple(supply.rng.sample(route, len(route))), question)


def frequent_word_needle(rng: random.Random, sayings: int) -> Needle:
    """A bird calls coined words; one of them clearly more often than any other."""
    favourite, *others = rng.sample(words.COINED, 6)
    often = max(3, sayings // 2)
    calls = [favourite] * often + [others[index % len(others)] for index in range(max(0, sayings - often))]
    rng.shuffle(calls)
    evidence = f"The bird calls {favourite}."
    question = Question("Which word is the word that the bird calls most?", (favourite,), (evidence,))
    return Needle(tuple(f"The bird calls {call}." for call in calls), question)


def _walk(rng: random.Random) -> str:
    return (
        f"The {rng.choice(words.MOODS)} {rng.choice(words.PEOPLE)} {rng.choice(words.MOTIONS)} "
        f"{rng.choice(words.DIRECTIONS)} the {rng.choice(words.SPOTS)} {rng.choice(words.TIMES)}."
    )


def _handling(rng: random.Random) -> str:
    # Without the actor, who would need "an".
    return (
        f"A {rng.choice(words.PEOPLE[1:])} {rng.choice(words.HANDLINGS)} the {rng.choice(words.THINGS)} "
        f"near the {rng.choice(words.SPOTS)}."
    )


def _weather(rng: random.Random) -> str:
    return (
        f"It was {rng.choice(words.WEATHERS)} on {rng.choice(words.DAYS)}, and the {rng.choice(words.PEOPLE)} "
        f"stood in the {rng.choice(words.SPOTS)}."
    )


def _saying(rng: random.Random) -> str:
    return (
        f"The {rng.choice(words.PEOPLE)} {rng.choice(words.SAYINGS)} that the {rng.choice(words.THINGS)} "
        f"was with the {rng.choice(words.MOODS)} {rng.choice(words.PEOPLE)}."
    )


def _meal(rng: random.Random) -> str:
    return (
        f"On {rng.choice(words.DAYS)} the {rng.choice(words.PEOPLE)} ate {rng.choice(words.MEALS)} "
        f"at the {rng.choice(words.SPOTS)}."
    )


_FILLERS: tuple[Callable[[random.Random], str], ...] = (_walk, _handling, _weather, _saying, _meal)


def filler(rng: random.Random) -> str:
    """A sentence without any fact that is asked for."""
    return rng.choice(_FILLERS)(rng)
