# SPDX-License-Identifier: Apache-2.0
"""One task at one length: its documents, and how every compression answers their questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.demo.documents import DEPTH_TASKS, Document, make_document, question_text, score_answer
from headkv_mm.evaluation.text.answering import Reader
from headkv_mm.evaluation.text.joined import JoinedCache, can_join
from headkv_mm.evaluation.text.recording import Recording, replay
from headkv_mm.evaluation.text.settings import EVICTS_WHILE_ANSWERING, Cell, TextSettings
from headkv_mm.evaluation.text.tokens import Encoder, Tokens

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, in turn, in tasks that can place it."""
BYTES = ("nbytes", "nbytes_peak", "nbytes_full")

_ROWS_TOGETHER = 512
_FULL_CACHES_TOGETHER = 4
"""Caches that answer together hold about as many bytes as this many full caches, and their copies as many again."""

OnDocuments = Callable[[int], object]


def cell_documents(cell: Cell, settings: TextSettings, encoder: Encoder) -> list[Document]:
    """The documents of a cell: each depends on seed, task, length and its number only.

    Raises:
        ValueError: if the length cannot be met with this tokenizer.
    """
    documents = []
    for index in range(settings.documents):
        rng = random.Random(f"{settings.seed}/{cell}/{index}")
        depth = document_depth(cell, index)
        documents.append(make_document(cell.task, rng, cell.length, encoder.count, depth=depth))
    return documents


def document_depth(cell: Cell, index: int) -> float | None:
    """Where the needle of a document lies, None for tasks that choose it at random."""
    return DEPTHS[index % len(DEPTHS)] if cell.task in DEPTH_TASKS else None


@dataclass
class Outcome:
    """What one compression made of the documents so far.

    Attributes:
        partial: per document the share of the values found, over all its questions.
        answers: per document the answer to each question.
        nbytes: sums over the documents, by `BYTES`, of the cache that holds the document, before any answer.
        ends: the same once the answer is written, for tasks in which the cache evicts while it answers.
    """

    partial: list[float]
    answers: list[list[str]]
    nbytes: dict[str, int]
    ends: dict[str, int]

    @classmethod
    def empty(cls) -> Outcome:
        """Nothing yet."""
        return cls([], [], dict.fromkeys(BYTES, 0), dict.fromkeys(BYTES, 0))


class CellRunner:
    """Runs compressions over cells.

    Args:
        model: a causal language model, on its device.
        encoder: its tokenizer.
        reader: feeds the model.
        settings: what to run.
    """

    def __init__(self, model: Any, encoder: Encoder, reader: Reader, settings: TextSettings) -> None:
        self._model, self._encoder, self._reader, self._settings = model, encoder, reader, settings

    def run(
        self, cell: Cell, compressions: Sequence[Compression], on_documents: OnDocuments = lambda count: None
    ) -> list[Outcome]:
        """Answer the questions of a cell with every compression.

        A prompt goes through the model once; every compression then chooses from the same keys and values. Only where
        later layers see chosen tokens it goes through once more.

        Args:
            cell: task and length.
            compressions: what is compared.
            on_documents: called with the number of documents that a compression has finished.
        """
        outcomes = [Outcome.empty() for _ in compressions]
        documents = cell_documents(cell, self._settings, self._encoder)
        for first in range(0, len(documents), self._settings.batch_size):
            batch = _Batch(self, documents[first : first + self._settings.batch_size])
            batch.answer_all(compressions, outcomes, on_documents)
        return outcomes


class _Batch:
    """Documents that are read together."""

    def __init__(self, runner: CellRunner, documents: Sequence[Document]) -> None:
        self.documents = documents
        self._model, self._encoder, self._reader = runner._model, runner._encoder, runner._reader
        self._evicts = documents[0].task in EVICTS_WHILE_ANSWERING
        self._asked = runner._settings.query_aware
        prompts = [self._encoder.document(document.text) for document in documents]
        if self._asked:
            for prompt, document in zip(prompts, documents, strict=True):
                prompt += self._encoder.following(question_text(document.questions[0].text))
        self._prompt, self._read = Recording(self._model), self._tokens(prompts)
        self._mask, self._scores = self._reader.read(self._prompt, self._read)

    def answer_all(
        self, compressions: Sequence[Compression], outcomes: Sequence[Outcome], on_documents: OnDocuments
    ) -> None:
        """Compress, ask every question in turn, and add what came out to `outcomes`."""
        waiting: list[tuple[HeadKVCache, Outcome]] = []
        held = 0
        for compression, outcome in zip(compressions, outcomes, strict=True):
            cache = HeadKVCache(self._model, compression)
            scores = self._scores
            if cache.propagation is None:
                replay(self._prompt, cache)
            else:
                _, scores = self._reader.read(cache, self._read)
            _add_bytes(outcome.nbytes, cache)
            if not can_join(cache):
                self._answer([(cache, outcome)], on_documents, scores)
                continue
            waiting.append((cache, outcome))
            held += cache.nbytes
            if held > _FULL_CACHES_TOGETHER * cache.nbytes_full or len(waiting) * len(self.documents) >= _ROWS_TOGETHER:
                self._answer(waiting, on_documents)
                waiting, held = [], 0
        if waiting:
            self._answer(waiting, on_documents)

    def _answer(
        self, group: Sequence[tuple[HeadKVCache, Outcome]], on_documents: OnDocuments, scores: Tensor | None = None
    ) -> None:
        """Ask with several caches together; `scores` [B, vocabulary] of the prompt if they are not the full cache's."""
        parts, rows = len(group), len(self.documents)
        first_scores = self._scores if scores is None else scores
        replies: list[list[str]] = [[] for _ in range(parts * rows)]
        used: list[HeadKVCache] = []
        for turn, limit in enumerate(self._limits()):
            used = [cache.copy(evict=self._evicts) for cache, _ in group]
            joined = JoinedCache(used) if parts > 1 else used[0]
            mask, first = self._ask(joined, turn, replies, first_scores.repeat(parts, 1))
            for reply, tokens in zip(
                replies, self._reader.answer(joined, mask, first, limit, parts=parts), strict=True
            ):
                reply.append(self._encoder.decode(tokens))
        for part, (_, outcome) in enumerate(group):
            given = replies[part * rows : (part + 1) * rows]
            if self._evicts:
                _add_bytes(outcome.ends, used[part])
            outcome.answers += given
            outcome.partial += [_found(*pair) for pair in zip(self.documents, given, strict=True)]
            on_documents(rows)

    def _ask(self, cache: Any, turn: int, replies: Sequence[Sequence[str]], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Read the conversation up to the question of this turn, with the answers that were given.

        Args:
            cache: holds the documents, once for every compression that is asked.
            turn: number of the question.
            replies: answers so far.
            scores: [P * B, vocabulary] after the prompt.
        """
        parts = len(scores) // len(self.documents)
        mask = self._mask.repeat(parts, 1)
        if turn == 0 and self._asked:
            return mask, scores
        rows = []
        for document, given in zip([*self.documents] * parts, replies, strict=True):
            questions = [question_text(question.text) for question in document.questions[: turn + 1]]
            answered = [*(f"{asked} {reply}" for asked, reply in zip(questions, given)), questions[turn]]
            text = "".join(answered)
            rows.append(self._encoder.following(text.removeprefix(questions[0]) if self._asked else text))
        return self._reader.read(cache, self._tokens(rows), mask)

    def _limits(self) -> Iterator[int]:
        """The most tokens of an answer to every question: that of the longest right one, and room to be wordy."""
        for turn in range(len(self.documents[0].questions)):
            replies = (self._encoder.following(document.questions[turn].reply) for document in self.documents)
            longest = max(map(len, replies))
            yield longest + longest // 4 + 16

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tokens:
        return Tokens.padded(rows, self._encoder.pad, self._model.device)


def _found(document: Document, answers: Sequence[str]) -> float:
    """Mean over the questions of the share of their values that the answers hold."""
    scores = [score_answer(question, answer) for question, answer in zip(document.questions, answers, strict=True)]
    return sum(scores) / len(scores)


def _add_bytes(sums: dict[str, int], cache: HeadKVCache) -> None:
    for name in BYTES:
        sums[name] += getattr(cache, name)
