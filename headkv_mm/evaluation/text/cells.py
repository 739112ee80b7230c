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
from headkv_mm.evaluation.text.recording import Recording, replay
from headkv_mm.evaluation.text.settings import EVICTS_WHILE_ANSWERING, Cell, TextSettings
from headkv_mm.evaluation.text.tokens import Encoder, Tokens

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, in turn, in tasks that can place it."""
BYTES = ("nbytes", "nbytes_peak", "nbytes_full")

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

        A prompt goes through the model once; every compression then chooses from the same keys and values.

        Args:
            cell: task and length.
            compressions: what is compared.
            on_documents: called with the number of documents that a compression has finished.
        """
        outcomes = [Outcome.empty() for _ in compressions]
        documents = cell_documents(cell, self._settings, self._encoder)
        for first in range(0, len(documents), self._settings.batch_size):
            batch = _Batch(self, documents[first : first + self._settings.batch_size])
            for compression, outcome in zip(compressions, outcomes, strict=True):
                batch.answer(compression, outcome)
                on_documents(len(batch.documents))
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
        self._prompt = Recording(self._model)
        self._mask, self._scores = self._reader.read(self._prompt, self._tokens(prompts))

    def answer(self, compression: Compression, outcome: Outcome) -> None:
        """Compress, ask every question in turn, and add what came out to `outcome`."""
        cache = HeadKVCache(self._model, compression)
        replay(self._prompt, cache)
        _add_bytes(outcome.nbytes, cache)
        replies: list[list[str]] = [[] for _ in self.documents]
        scores: list[list[float]] = [[] for _ in self.documents]
        used = cache
        for turn, limit in enumerate(self._limits()):
            used = cache.copy(evict=self._evicts)
            mask, first = self._ask(used, turn, replies)
            tokens = self._reader.answer(used, mask, first, limit)
            for row, document in enumerate(self.documents):
                replies[row].append(self._encoder.decode(tokens[row]))
                scores[row].append(score_answer(document.questions[turn], replies[row][-1]))
        if self._evicts:
            _add_bytes(outcome.ends, used)
        outcome.partial += [sum(row) / len(row) for row in scores]
        outcome.answers += replies

    def _ask(self, cache: HeadKVCache, turn: int, replies: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Read the conversation up to the question of this turn, with the answers that were given."""
        if turn == 0 and self._asked:
            return self._mask, self._scores
        rows = []
        for document, given in zip(self.documents, replies, strict=True):
            questions = [question_text(question.text) for question in document.questions[: turn + 1]]
            parts = [*(f"{asked} {reply}" for asked, reply in zip(questions, given)), questions[turn]]
            text = "".join(parts)
            rows.append(self._encoder.following(text.removeprefix(questions[0]) if self._asked else text))
        return self._reader.read(cache, self._tokens(rows), self._mask)

    def _limits(self) -> Iterator[int]:
        """The most tokens of an answer to every question: that of the longest right one, and room to be wordy."""
        for turn in range(len(self.documents[0].questions)):
            replies = (self._encoder.following(document.questions[turn].reply) for document in self.documents)
            longest = max(map(len, replies))
            yield longest + longest // 4 + 16

    def _tokens(self, rows: Sequence[Sequence[int]]) -> Tokens:
        return Tokens.padded(rows, self._encoder.pad, self._model.device)


def _add_bytes(sums: dict[str, int], cache: HeadKVCache) -> None:
    for name in BYTES:
        sums[name] += getattr(cache, name)
