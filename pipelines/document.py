# SPDX-License-Identifier: Apache-2.0
"""A document that was read once and compressed, and that answers many questions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from headkv_mm.cache import HeadKVCache
from headkv_mm.devices import input_device
from headkv_mm.pipelines.answering import AnswerStream, TokenClock
from headkv_mm.pipelines.answers import Answer, DocumentReport
from headkv_mm.pipelines.questions import answer_settings, check_length, check_question
from headkv_mm.pipelines.saved_documents import save_document
from headkv_mm.pipelines.words import count_known_words

if TYPE_CHECKING:
    from transformers.generation import StoppingCriteriaList

    from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline


class Document:
    """A compressed document of a `LongDocumentQAPipeline`; made by its `read` and `load`.

    Every question starts from a copy of the document's cache, in which nothing is evicted any more: the document stays
    as it is, and answers do not depend on the order of questions.

    Attributes:
        cache: the document's `HeadKVCache`, one row. Reading it is fine; whoever writes to it changes the document.
        ids: the tokens that the cache stands for: the document, and the question if it was compressed for one; the
            last token of that question is not in the cache, as the answer begins with it.
        report: bytes, tokens kept and time, as a `DocumentReport`.
    """

    def __init__(
        self, pipeline: LongDocumentQAPipeline, cache: HeadKVCache, ids: list[int], report: DocumentReport
    ) -> None:
        self.cache, self.ids, self.report = cache, ids, report
        self._pipeline = pipeline

    @overload
    def ask(self, question: str | None = None, *, stream: Literal[False] = False, **settings: Any) -> Answer: ...

    @overload
    def ask(self, question: str | None = None, *, stream: Literal[True], **settings: Any) -> AnswerStream: ...

    @overload
    def ask(self, question: Sequence[str], *, stream: Literal[False] = False, **settings: Any) -> list[Answer]: ...

    def ask(
        self, question: str | Sequence[str] | None = None, *, stream: bool = False, **settings: Any
    ) -> Answer | AnswerStream | list[Answer]:
        """Ask one question or several, each for itself.

        Args:
            question: the question, or a list of questions. A document that was compressed for a question answers that
                one, which may be left out, and no other.
            stream: return an `AnswerStream`, an iterator over pieces of text; for one question.
            **settings: `max_new_tokens`, and anything else that `generate` takes for one sequence, such as
                `do_sample=True, temperature=0.7`. Greedy by default.

        Returns:
            An `Answer`, an `AnswerStream`, or a list of answers.

        Raises:
            ValueError: for an empty question, one that does not fit behind the document, or another question than the
                one the document was compressed for.
            TypeError: for a question that is no text, or a setting that `ask` rules.
        """
        if question is None or isinstance(question, str):
            ask = self._prepare(question, settings)
            return AnswerStream(ask) if stream else ask(None, None)
        if stream:
            raise ValueError("stream=True is for one question: ask them one after the other")
        questions = list(question)
        if not questions:
            raise ValueError("got an empty list of questions: ask at least one")
        prepared = [self._prepare(item, settings) for item in questions]  # all of them, before the first is asked
        return [ask(None, None) for ask in prepared]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document's cache as one safetensors file, for `LongDocumentQAPipeline.load`.

        Raises:
            OSError: if it cannot be written; an older file of that name is then still whole.
        """
        save_document(self, path, self._pipeline)

    def kept_positions(self) -> list[list[torch.Tensor]]:
        """Positions of `ids` that every layer's KV heads keep: `[layer][head]` sorted int64.

        Layers that the cache leaves as they are (sliding windows, say) are left out.
        """
        from headkv_mm.layer import HeadKVLayer

        layers = [index for index, layer in enumerate(self.cache.layers) if isinstance(layer, HeadKVLayer)]
        return [self.cache.kept_positions(layer)[0] for layer in layers]

    def count_known_words(self, text: str) -> tuple[int, int]:
        """Words of a text that the tokenizer knows, and all words; those of the document are in the report."""
        return count_known_words(self._pipeline.tokenizer, text)

    def _prepare(
        self, question: str | None, settings: dict[str, Any]
    ) -> Callable[[Callable[[str], None] | None, StoppingCriteriaList | None], Answer]:
        """Check a question; returns what asks it."""
        text = self._question(question)
        pipeline = self._pipeline
        new = [] if self.report.query_aware else pipeline.question_ids(text)
        ids = [*self.ids, *new]
        generate_settings = answer_settings(
            pipeline.model, pipeline.tokenizer, settings, max_new_tokens=pipeline.max_new_tokens
        )
        check_length(
            pipeline.model, document=len(self.ids), question=len(new), answer=generate_settings["max_new_tokens"]
        )

        def ask(on_text: Callable[[str], None] | None, stop: StoppingCriteriaList | None) -> Answer:
            return self._answer(text, ids, generate_settings, on_text, stop)

        return ask

    def _question(self, question: str | None) -> str:
        known = self.report.question
        if question is None:
            if known is None:
                raise TypeError("ask() needs a question")
            return known
        question = check_question(question)
        if known is not None and question != known:
            raise ValueError(
                f"this document was compressed for the question {known!r} and keeps what that one needs: read it "
                "again for another question, or without query_aware for any"
            )
        return question

    def _answer(
        self,
        question: str,
        ids: list[int],
        settings: dict[str, Any],
        on_text: Callable[[str], None] | None,
        stop: StoppingCriteriaList | None,
    ) -> Answer:
        model, tokenizer = self._pipeline.model, self._pipeline.tokenizer
        began = time.perf_counter()
        clock = TokenClock(tokenizer, on_text)
        prompt = torch.tensor([ids], device=input_device(model))
        with torch.no_grad():
            cache = self.cache.copy(evict=False)
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                streamer=clock,
                stopping_criteria=stop,
                **settings,
            )
        times, report = clock.times, self.report
        later = times[-1] - times[0]
        return Answer(
            text=clock.text,
            question=question,
            tokens=len(clock.ids),
            complete=clock.ids[-1] in settings["eos_token_id"],
            seconds_to_first_token=times[0] - began,
            tokens_per_second=(len(times) - 1) / later if later > 0 else None,
            nbytes=cache.nbytes,
            nbytes_full=cache.nbytes_full,
            kept=report.kept,
            document_tokens=report.tokens,
            method=report.method,
            budget=report.budget,
            query_aware=report.query_aware,
        )
