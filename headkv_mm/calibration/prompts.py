# SPDX-License-Identifier: Apache-2.0
"""Needle-with-reasoning prompts: a right answer, a wrong one, and a sentence that tells which is which.

    ... The neighbour of the blue inn is the warm river. ... The code of the warm river is 2998. ...
    ... The neighbour of the tall mill is the old bay. ... The code of the old bay is 1234. ...

    Question: What is the code of the neighbour of the blue inn?

The two codes can only be told apart by way of the neighbours. The words are those of the generated documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from headkv_mm.demo.documents import Question, question_text, score_answer
from headkv_mm.demo.documents.sentences import Supply, fact, filler
from headkv_mm.demo.documents.tasks import scatter
from headkv_mm.demo.documents.words import RELATIONS, draw_names
from headkv_mm.evaluation.text.tokens import Encoder

_INSTRUCTION = "Answer the question from the text above."
_TRIES = 8


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt.

    Attributes:
        text: all of it, with the chat template's signs if the tokenizer has a template.
        ids: its tokens.
        needle: the sentence that holds the right answer.
        span: first token of that sentence, and the token after its last.
        right, wrong: the two values.
    """

    text: str
    ids: tuple[int, ...]
    needle: str
    span: tuple[int, int]
    right: str
    wrong: str

    def is_right(self, answer: str) -> bool:
        """Whether an answer holds the right value and not the wrong one."""
        return bool(_holds(answer, self.right)) and not _holds(answer, self.wrong)


@dataclass(frozen=True)
class _Story:
    """The sentences before they are mixed with filler."""

    needle: str
    others: tuple[str, ...]
    question: str
    right: str
    wrong: str


def needle_prompt(tokenizer: Any, rng: random.Random, length: int, depth: float) -> NeedlePrompt:
    """Make a prompt.

    Args:
        tokenizer: of transformers; its chat template is used if it has one.
        rng: source of randomness.
        length: tokens of the prompt; it has at most this many, and not many fewer.
        depth: where the right answer lies among the sentences, 0.0 at the beginning, 1.0 at the end.

    Raises:
        ValueError: if the length is too short for the question and its sentences, or the chat template does not show
            the text.
    """
    story, fillers = _story(rng), [filler(rng)]
    encode = _Encode(tokenizer)
    bare = len(encode(encode.text(_document(rng, story, [], depth), story.question)))
    if bare > length:
        raise ValueError(f"prompts of {length} tokens are too short: the question and its facts alone need {bare}")
    text, ids = "", tuple[int, ...]()
    for attempt in range(_TRIES):
        each = max(1.0, encode.length(" ".join(fillers)) / len(fillers))
        # A little less after every prompt that came out too long.
        wanted = int((length - bare) / each * (1.0 - 0.02 * attempt))
        fillers += [filler(rng) for _ in range(wanted - len(fillers))]
        text = encode.text(_document(rng, story, fillers[:wanted], depth), story.question)
        ids = encode(text)
        if attempt and len(ids) <= length:  # the first estimate is one sentence's
            break
    else:
        raise ValueError(f"no prompt of {length} tokens came out: ask for a longer one")
    begin = text.find(story.needle)
    if begin < 0:
        raise ValueError(
            "the chat template of the tokenizer does not show a user's text unchanged; set "
            "tokenizer.chat_template = None for a plain prompt"
        )
    span = _common(ids, encode(text[:begin])), _common(ids, encode(text[: begin + len(story.needle)]))
    return NeedlePrompt(text, ids, story.needle, span, story.right, story.wrong)


def _story(rng: random.Random) -> _Story:
    asked, right_name, other, wrong_name = draw_names(rng, 4, held_out=False)
    relation = rng.choice(RELATIONS)[0]
    supply = Supply(rng)
    right, wrong = supply.number(), supply.number()
    return _Story(
        needle=fact(relation, right_name, right),
        others=(
            fact("neighbour", asked, f"the {right_name}"),
            fact("neighbour", other, f"the {wrong_name}"),
            fact(relation, wrong_name, wrong),
        ),
        question=f"What is the {relation} of the neighbour of the {asked}?",
        right=right,
        wrong=wrong,
    )


def _document(rng: random.Random, story: _Story, fillers: list[str], depth: float) -> str:
    """The sentences in one text, the needle where `depth` says, the others anywhere."""
    parts = scatter(rng, tuple((sentence,) for sentence in story.others), fillers)
    parts.insert(round(depth * len(parts)), story.needle)
    return " ".join(parts)


class _Encode:
    """Text to prompt, and prompt to tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._encoder = tokenizer, Encoder(tokenizer)
        self._chat = bool(getattr(tokenizer, "chat_template", None))

    def text(self, document: str, question: str) -> str:
        """The prompt around a document and a question."""
        if not self._chat:
            return document + question_text(question)
        content = f"{document}\n\n{_INSTRUCTION}\nQuestion: {question}"
        try:
            message = {"role": "user", "content": content}
            return str(self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise ValueError(f"the chat template of the tokenizer fails: {' '.join(str(error).split())}") from error

    def __call__(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt, or of its beginning."""
        return tuple(self._encoder.following(text) if self._chat else self._encoder.document(text))

    def length(self, text: str) -> int:
        """Tokens of a text within a prompt."""
        return len(self._encoder.following(text))


def _common(ids: tuple[int, ...], beginning: tuple[int, ...]) -> int:
    """How many tokens two sequences share from the start: where the text of `beginning` ends in `ids`."""
    count = 0
    for left, right in zip(ids, beginning):
        if left != right:
            break
        count += 1
    return count


def _holds(answer: str, value: str) -> float:
    return score_answer(Question("", (value,), ()), answer)
