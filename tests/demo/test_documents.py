# SPDX-License-Identifier: Apache-2.0
"""Generated documents: answers in the text, lengths, seeds, names kept out of training, scoring."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.demo.documents import (
    DEPTH_TASKS,
    TASKS,
    Document,
    is_held_out,
    make_document,
    prompt_text,
    question_text,
    score_answer,
)
from headkv_mm.demo.documents.examples import EXAMPLE_LENGTHS, example_documents, make_example, write_examples
from headkv_mm.demo.documents.sentences import Question, Supply, joint_question, number_needle
from headkv_mm.demo.documents.words import draw_names

seeds = st.integers(0, 2**32)


def count_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]+|[0-9]|[.,?:]", text))


def count_letters_in_pairs(text: str) -> int:
    """A tokenizer that needs many tokens for a word."""
    return (len(text) + 1) // 2


def sentences(document: Document) -> list[str]:
    return [f"{part}." for part in document.text.removesuffix(".").split(". ")]


@settings(deadline=None, max_examples=60)
@given(task=st.sampled_from(TASKS), seed=seeds, length=st.integers(150, 2500))
def test_length_and_evidence(task: str, seed: int, length: int) -> None:
    document = make_document(task, random.Random(seed), length, count_words)
    tokens = count_words(prompt_text(document, len(document.questions) - 1))
    assert length - max(32, length // 20) <= tokens <= length
    told = sentences(document)
    assert document.facts
    assert [sentence for sentence in told if sentence in set(document.facts)] == list(document.facts)
    for question in document.questions:
        assert question.text.endswith("?")
        assert set(question.evidence) <= set(told)
        assert score_answer(question, question.reply) == 1
        assert score_answer(question, question.reply.upper()) == 1


@settings(deadline=None, max_examples=30)
@given(task=st.sampled_from(TASKS), seed=seeds)
def test_any_tokenizer_and_equal_seeds(task: str, seed: int) -> None:
    first, second = (make_document(task, random.Random(seed), 900, count_letters_in_pairs) for _ in range(2))
    assert first == second
    assert 855 <= count_letters_in_pairs(prompt_text(first, len(first.questions) - 1)) <= 900
    assert make_document(task, random.Random(seed + 1), 900, count_letters_in_pairs) != first


@settings(deadline=None, max_examples=40)
@given(task=st.sampled_from(TASKS), seed=seeds, held_out=st.booleans())
def test_names_of_facts_are_all_kept_out_of_training_or_all_in_it(task: str, seed: int, held_out: bool) -> None:
    document = make_document(task, random.Random(seed), 400, count_words, held_out=held_out)
    names = [name for fact in document.facts for name in re.findall(r"of the (\w+ \w+)(?: on \w+)? is", fact)]
    assert names or task == "frequent-words"
    assert all(is_held_out(name) is held_out for name in names)


def test_each_value_depends_on_the_document() -> None:
    """Answers of one document score nothing on another one: none can be guessed."""
    for task in TASKS:
        if task in ("frequent-words", "list"):
            continue  # few words to choose from
        documents = [make_document(task, random.Random(seed), 300, count_words) for seed in range(20)]
        for document, other in pairwise(documents):
            question = Question("", tuple(value for value in document.questions[0].answers if value.isdigit()), ())
            assert score_answer(question, other.text) < 1


@pytest.mark.parametrize("task", DEPTH_TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_depth(task: str, depth: float) -> None:
    for seed in range(5):
        document = make_document(task, random.Random(seed), 1000, count_words, depth=depth)
        told = sentences(document)
        place = told.index(document.questions[0].evidence[0]) / (len(told) - 1)
        assert abs(place - depth) < 0.02


def test_two_turns_ask_about_different_halves() -> None:
    for seed in range(10):
        document = make_document("two-turn", random.Random(seed), 600, count_words)
        told = sentences(document)
        first, second = (told.index(question.evidence[0]) / len(told) for question in document.questions)
        assert min(first, second) <= 0.5 <= max(first, second) + 0.02


def test_a_route_is_long_and_connected() -> None:
    document = make_document("long-generation", random.Random(0), 2048, count_words)
    (question,) = document.questions
    assert count_words(question.reply) >= 1000
    assert len(question.evidence) == len(question.answers)
    for sentence, following in pairwise(question.evidence):
        after = sentence.removesuffix(".").split("then the ")[1]
        assert f"The code of the {after} is" in following
    assert question.evidence[-1].endswith("then nothing.")
    assert list(question.evidence) != list(document.facts)  # told in another order


def test_one_word_is_called_most() -> None:
    for seed in range(20):
        document = make_document("frequent-words", random.Random(seed), 500, count_words)
        calls = [fact.split()[-1].removesuffix(".") for fact in document.facts]
        counts = sorted(((calls.count(word), word) for word in set(calls)), reverse=True)
        assert counts[0][1] == document.questions[0].answers[0]
        assert counts[0][0] > counts[1][0]


@pytest.mark.parametrize(
    ("task", "length", "depth", "message"),
    [
        ("needle", 500, None, "there is no task 'needle'"),
        ("list", 500, 0.5, "single and multi-key only"),
        ("single", 500, 1.5, "between 0 and 1"),
        ("single", 10, None, "no single document of 10 tokens"),
        ("multi-value", 40, None, "no multi-value document of 40 tokens"),
    ],
)
def test_bad_requests(task: str, length: int, depth: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_document(task, random.Random(0), length, count_words, depth=depth)


def test_names_share_no_word_while_there_are_enough() -> None:
    for held_out in (False, True):
        names = draw_names(random.Random(3), 64, held_out)
        assert len(set(names)) == 64
        parts = [part for name in names[:45] for part in name.split()]
        assert len(set(parts)) == 90


def test_too_many_names() -> None:
    with pytest.raises(ValueError, match="use fewer facts"):
        draw_names(random.Random(0), 10_000, held_out=True)


def test_prompts() -> None:
    document = make_document("two-turn", random.Random(1), 200, count_words)
    first, second = document.questions
    assert prompt_text(document) == document.text + question_text(first.text)
    assert prompt_text(document, 1) == f"{prompt_text(document)} {first.reply}{question_text(second.text)}"
    assert prompt_text(document, 1, ["No idea."]).count("No idea.") == 1
    assert prompt_text(document, 1, []) == document.text + question_text(second.text)
    with pytest.raises(ValueError, match="there is no number 2"):
        prompt_text(document, 2)
    with pytest.raises(ValueError, match="expected 1 replies"):
        prompt_text(document, 1, ["a", "b"])


def test_scores() -> None:
    question = Question("?", ("0123", "old mill", "77"), ())
    assert score_answer(question, "It is 0123, the Old  Mill and 77!") == 1
    assert score_answer(question, "77, old mill, 0123") == pytest.approx(1 / 3)
    assert score_answer(question, "0123 old mill") == pytest.approx(2 / 3)
    assert score_answer(question, "01234 old mills 777") == 0
    assert score_answer(question, "") == 0
    repeated = Question("?", ("5", "5"), ())
    assert score_answer(repeated, "5 5") == 1
    assert score_answer(repeated, "5") == 0.5


def test_a_joint_question_asks_for_all() -> None:
    supply = Supply(random.Random(0))
    needles = [number_needle(supply, name) for name in ("warm river", "old mill")]
    question = joint_question(needles)
    assert question.text.count("of the") == 2
    assert question.answers == tuple(needle.question.answers[0] for needle in needles)
    assert question.reply == " ".join(needle.sentences[0] for needle in needles)


def test_values_of_one_document_are_told_apart_early() -> None:
    document = make_document("multi-key", random.Random(0), 2048, count_words)
    beginnings = [fact.split()[-1][:2] for fact in document.facts]
    assert len(beginnings) == len(set(beginnings)) == 64
    document = make_document("list", random.Random(0), 1024, count_words)
    items = [item for fact in document.facts for item in fact.removesuffix(".").split(" is ")[1].split(", ")]
    assert len(items) == len(set(items)) > 20
    supply = Supply(random.Random(0))
    assert len({supply.number()[:2] for _ in range(100)}) == 100
    assert len(supply.number()) == 4  # and on it goes
    assert all(len(set(supply.items(6))) == 6 for _ in range(20))


def test_examples_are_what_the_generator_makes(tmp_path: Path) -> None:
    folder = tmp_path / "examples"
    write_examples(folder)
    for made, shipped in zip(example_documents(folder), example_documents(), strict=True):
        assert made.document.read_bytes() == shipped.document.read_bytes()
        assert made.questions.read_bytes() == shipped.questions.read_bytes()
        length = count_words(shipped.document.read_text(encoding="utf-8"))
        assert 0.85 * EXAMPLE_LENGTHS[shipped.name] < length < EXAMPLE_LENGTHS[shipped.name]
        document = make_example(shipped.name)
        assert " ".join(shipped.document.read_text(encoding="utf-8").split()) == document.text
        assert [item.text for item in document.questions] == shipped.questions.read_text(encoding="utf-8").splitlines()


def test_a_missing_example(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reinstall headkv-mm"):
        example_documents(tmp_path)
