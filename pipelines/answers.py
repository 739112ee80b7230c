# SPDX-License-Identifier: Apache-2.0
"""What reading a document and asking about it returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headkv_mm.pipelines.outputs import format_bytes
from headkv_mm.pipelines.text_reports import cache_name, plain

AWARE = "compressed knowing the question"


@dataclass(frozen=True)
class DocumentReport:
    """What a document takes after reading.

    Attributes:
        names: the files it came from; empty for a text given as such.
        method: name of the compression, "none" for the full cache.
        budget: what was asked for; None for the full cache.
        options: the method's options.
        query_aware: whether the document was compressed after the question was seen. Numbers with True say nothing
            about other questions.
        question: the question it was compressed for; None unless `query_aware`.
        tokens: tokens of the document, and of the question if `query_aware`.
        kept: tokens kept per KV head, on the average over layers and heads.
        nbytes: bytes the cache holds, bookkeeping included.
        nbytes_full: bytes of a full cache of these tokens.
        nbytes_peak: the most that the cache held while the document was read, layer by layer.
        seconds: wall-clock time of reading and compressing.
        known_words, words: words of the text that the tokenizer knows, and all words.
    """

    names: tuple[str, ...]
    method: str
    budget: float | int | str | None
    options: dict[str, Any]
    query_aware: bool
    question: str | None
    tokens: int
    kept: float
    nbytes: int
    nbytes_full: int
    nbytes_peak: int
    seconds: float
    known_words: int
    words: int

    @property
    def ratio(self) -> float:
        """Bytes held as a share of the full cache."""
        return self.nbytes / self.nbytes_full if self.nbytes_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, text, lists and dicts."""
        options = {name: plain(value) for name, value in self.options.items()}
        return {**asdict(self), "names": list(self.names), "options": options, "ratio": self.ratio}

    def __str__(self) -> str:
        aware = f", {AWARE}" if self.query_aware else ""
        return (
            f"{cache_name(self.method, self.budget)}{aware}: {format_bytes(self.nbytes)} held of "
            f"{format_bytes(self.nbytes_full)} ({self.ratio:.1%}), {self.kept:.0f} of {self.tokens} tokens per head, "
            f"read in {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: the answer.
        question: the question.
        tokens: tokens of the answer, the end included.
        complete: whether the model ended the answer itself, before `max_new_tokens`.
        seconds_to_first_token: from the question to the first token: copying the document's cache and reading the
            question.
        tokens_per_second: of the tokens after the first; None for a single one.
        nbytes: bytes of the cache at the end: the compressed document, the question and the answer.
        nbytes_full: bytes of a full cache at that moment.
        kept: tokens of the document kept per KV head, on the average over layers and heads.
        document_tokens: tokens of the document.
        method, budget: the compression of the document.
        query_aware: whether the document was compressed after this question was seen.
    """

    text: str
    question: str
    tokens: int
    complete: bool
    seconds_to_first_token: float
    tokens_per_second: float | None
    nbytes: int
    nbytes_full: int
    kept: float
    document_tokens: int
    method: str
    budget: float | int | str | None
    query_aware: bool

    @property
    def ratio(self) -> float:
        """Bytes held at the end as a share of the full cache."""
        return self.nbytes / self.nbytes_full if self.nbytes_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and text."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        return self.text
