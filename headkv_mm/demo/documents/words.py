# SPDX-License-Identifier: Apache-2.0
"""The words that generated documents are made of."""

from __future__ import annotations

import hashlib
import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: tuple[str, ...] = _words(
    """
    amber ancient bitter blue brave bright broad broken calm cold copper crooked curved dark deep dusty eastern
    empty frozen golden green grey heavy hidden hollow iron lonely lost low marble misty modern narrow new
    northern old pale purple quiet red round royal rusty sandy secret silver small southern steep stone sunny
    tall twin warm western white wild windy wooden
    """
)
NOUNS: tuple[str, ...] = _words(
    """
    abbey arch arena attic bakery barn bay bridge cabin camp canal castle cave cellar chapel cliff court dam
    dock factory farm ferry forest forge fountain gallery garden gate harbour hotel island kitchen lagoon lake
    library lighthouse lodge market meadow mill mine museum orchard palace park pier pond port prison river
    school stable station temple theatre tower tunnel valley villa village well
    """
)
RELATIONS: tuple[tuple[str, str], ...] = (
    ("code", "codes"),
    ("price", "prices"),
    ("weight", "weights"),
    ("level", "levels"),
    ("number", "numbers"),
    ("age", "ages"),
)
SPARE_WORDS: tuple[str, ...] = ("first", "second", "third", "fourth")  # known, but in no sentence
CARDINALS: tuple[str, ...] = ("one", "two", "three", "four")
ITEMS: tuple[str, ...] = _words(
    """
    apples barley bells blankets bread bricks butter candles cheese coal cotton flour flutes glass grapes
    hammers honey ink jars kettles lamps lemons maps milk nails needles olives onions paint paper pearls pepper
    plums rice ropes salt silk soap spoons sugar tea timber tin wax wine wool
    """
)
COINED: tuple[str, ...] = _words(
    "blim dorp fazik gomel hupra jinta kolvu lemso mirbo nazet pruvo quim rasko tolvi vemba zirko"
)
MOODS: tuple[str, ...] = _words(
    """
    angry anxious careful cheerful clever curious famous friendly gentle happy honest hungry lazy nervous
    patient polite proud silent sleepy tired young
    """
)
PEOPLE: tuple[str, ...] = _words(
    """
    actor baker captain child clerk cook doctor driver farmer fisherman gardener hunter judge lawyer merchant
    nurse painter pilot poet sailor singer soldier student tailor teacher writer
    """
)
MOTIONS: tuple[str, ...] = _words("came drove hurried moved ran returned rode sailed travelled walked wandered went")
DIRECTIONS: tuple[str, ...] = ("around", "from", "into", "past", "to", "toward")
SPOTS: tuple[str, ...] = _words("beach church corner field fence hill house inn road shop square street wall yard")
TIMES: tuple[str, ...] = _words("again alone early late often once quickly slowly today together twice yesterday")
THINGS: tuple[str, ...] = _words("bag basket boat book box chair coat cup door drum hat horse letter rug table wagon")
HANDLINGS: tuple[str, ...] = _words("borrowed bought carried cleaned dropped found lost moved repaired sold")
SAYINGS: tuple[str, ...] = ("hoped", "knew", "said", "thought", "wrote")
WEATHERS: tuple[str, ...] = _words("cloudy cool dry foggy hot mild rainy stormy")
DAYS: tuple[str, ...] = _words("monday tuesday wednesday thursday friday saturday sunday")
MEALS: tuple[str, ...] = ("beans", "fish", "pie", "soup", "stew")
FUNCTION_WORDS: tuple[str, ...] = _words(
    """
    a all and answer are at ate before bird calls did every for in is it list most near neighbour next nothing
    of on one other people question route stood than that the then there took up was weather were what which
    while with word would
    """
)
PUNCTUATION: tuple[str, ...] = (".", ",", "?", ":")
DIGITS: tuple[str, ...] = tuple("0123456789")

HELD_OUT_SHARE = 8  # one name in this many is never trained on


def is_held_out(name: str) -> bool:
    """Whether a name ("warm river") is kept for documents that no model was trained on; decided by a hash."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


_NAMES = {
    kept: tuple(
        name for adjective in ADJECTIVES for noun in NOUNS if is_held_out(name := f"{adjective} {noun}") is kept
    )
    for kept in (False, True)
}


def draw_names(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Draw different names for the things that facts are about.

    No two of them share a word, as long as there are enough words: then half a name is enough to tell things apart, as
    it would be with a larger vocabulary.

    Args:
        rng: source of randomness.
        count: how many; the last ones share words with others if there are more than about fifty.
        held_out: draw from the names that are never trained on, or from the others.

    Raises:
        ValueError: if there are fewer names than that.
    """
    names = _NAMES[held_out]
    if count > len(names):
        raise ValueError(f"a document can name at most {len(names)} things, asked for {count}: use fewer facts")
    drawn = rng.sample(names, min(len(names), max(count, 400)))
    used: set[str] = set()
    first, rest = [], []
    for name in drawn:
        parts = name.split()
        if used.isdisjoint(parts):
            first.append(name)
            used.update(parts)
        else:
            rest.append(name)
    return (first + rest)[:count]


def vocabulary() -> tuple[str, ...]:
    """Every word and sign that a document, a question or an answer can hold, in a fixed order, without repeats."""
    relations = tuple(word for pair in RELATIONS for word in pair)
    groups = (
        *(
            PUNCTUATION,
            DIGITS,
            FUNCTION_WORDS,
            relations,
            SPARE_WORDS,
            CARDINALS,
            ADJECTIVES,
            NOUNS,
            ITEMS,
            COINED,
            MOODS,
        ),
        *(PEOPLE, MOTIONS, DIRECTIONS, SPOTS, TIMES, THINGS, HANDLINGS, SAYINGS, WEATHERS, DAYS, MEALS),
    )
    return tuple(dict.fromkeys(word for group in groups for word in group))
