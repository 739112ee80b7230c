# SPDX-License-Identifier: Apache-2.0
"""A generated document with its questions, the prompt made of them, and the score of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headkv_mm.demo.documents.sentences import Question


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        task: kind of task, one of `TASKS`.
        text: the sentences, joined by spaces.
        facts: all sentences with facts, asked for or not, in the document's order.
        questions: what is asked, in this order.
    """

    task: str
    text: str
    facts: tuple[str, ...]
    questions: tuple[Question, ...]


def question_text(question: str) -> str:
    """What follows a document in a prompt: the question, up to the place where the answer begins."""
    return f"\n\nQuestion: {question}\nAnswer:"


def prompt_text(document: Document, turn: int = 0, replies: Sequence[str] | None = None) -> str:
    """The prompt for one question.

    Args:
        document: the document.
        turn: index of the question.
        replies: answers already given to the questions before it, one each; the right ones if left out. Pass an empty
            list to ask the question without the earlier ones.

    Raises:
        ValueError: if there is no such question, or the number of replies fits neither.
    """
    if not 0 <= turn < len(document.questions):
        raise ValueError(f"the document has {len(document.questions)} questions, there is no number {turn}")
    earlier = document.questions[:turn]
    if replies is None:
        replies = [question.reply for question in earlier]
    if len(replies) not in (0, turn):
        raise ValueError(f"expected {turn} replies to the earlier questions or none, got {len(replies)}")
    turns = [f"{question_text(item.text)} {reply}" for item, reply in zip(earlier, replies)]
    return document.text + "".join(turns) + question_text(document.questions[turn].text)


def score_answer(question: Question, answer: str) -> float:
    """Share of the question's values that an answer holds, in their order.

    Upper and lower case are the same. A value counts if it follows the value found before it, and if it is not part of
    a longer word or number.

    Returns:
        0.0 to 1.0; 1.0 is an exact match.
    """
    text = _spaced(answer)
    position = found = 0
    for value in question.answers:
        place = text.find(_spaced(value), position)
        if place >= 0:
            found += 1
            position = place + len(_spaced(value)) - 1
    return found / len(question.answers)


def _spaced(text: str) -> str:
    """Lower case, every sign that is no letter and no digit a space, one space around every word."""
    return " " + " ".join("".join(sign if sign.isalnum() else " " for sign in text.lower()).split()) + " "
