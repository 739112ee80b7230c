# SPDX-License-Identifier: Apache-2.0
"""The pipeline that reads a document once and answers many questions about it."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.pipelines.base import Pipeline

from headkv_mm.cache import HeadKVCache
from headkv_mm.pipelines.answers import DocumentReport
from headkv_mm.pipelines.defaults import CHUNK_SIZE, DEFAULT_BUDGET, MAX_NEW_TOKENS, METHOD
from headkv_mm.pipelines.document import Document
from headkv_mm.pipelines.document_prompts import PromptFormat
from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.questions import check_count, check_length, check_question, end_tokens
from headkv_mm.pipelines.saved_documents import load_document
from headkv_mm.pipelines.words import count_known_words

if TYPE_CHECKING:
    from headkv_mm.compression import Compression

_KV = ("kv_compression", "kv_budget", "kv_options")
_OWN = ("chunk_size", "compress_chunks", "max_new_tokens")
_IGNORED = ("local_files_only",)  # transformers.pipeline leaves it in the arguments


class LongDocumentQAPipeline(Pipeline):
    """Reads documents into a compressed KV cache and answers questions from it.

        qa = headkv_mm.pipeline("long-document-question-answering")
        doc = qa.read("report.pdf")
        print(doc.ask("What is the code of the warm river?"))

    A document is compressed before any question is seen, unless `read` is told otherwise. Every argument below may be
    given when the pipeline is made and again with `read`, which then goes first.

    Args:
        kv_compression: name of a method, a dict, or a `Compression`; "none" or None for the full cache.
        kv_budget: share of the document's tokens that a KV head keeps on the average (0 to 1), entries per KV head
            (int), or bytes of the whole cache ("64MiB").
        kv_options: dict of options of the method.
        chunk_size: tokens of the document that go through the model at once.
        compress_chunks: compress after every chunk instead of once at the end. Then no more than a chunk is held beside
            what the budget keeps, and what was dropped early cannot come back: answers get worse.
        max_new_tokens: longest answer; also an argument of `ask`.

    Raises:
        ValueError: for an unknown method or option, a budget out of range, a model that cannot be compressed, or a
            tokenizer that does not belong to the model.
        TypeError: for an argument the pipeline does not have.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    # The base class would change the model's generation config; `ask` takes what it needs instead.
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Bind model and tokenizer and check all arguments."""
        super().__init__(*args, **kwargs)
        if self.tokenizer is None:
            raise ValueError("documents are read with a tokenizer and there is none: pass tokenizer=...")
        rows = self.model.get_input_embeddings().weight.shape[0]
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= rows:
            raise ValueError(
                f"the tokenizer has tokens up to {largest} and the model knows {rows}: they do not belong together"
            )
        if not end_tokens(self.model, self.tokenizer):
            raise ValueError("neither the tokenizer nor the model has an end-of-text token: set tokenizer.eos_token")
        self.model.eval()
        self.prompt_format = PromptFormat.of(self.tokenizer)
        self._check_compression(self._forward_params.get("kv", KVArguments()))

    def __call__(self, documents: Any, questions: Any = None, **kwargs: Any) -> Any:
        """Read and ask at once: `qa("report.pdf", "What ...?")`, or a dict with "documents" or "text", and "questions".

        Returns:
            An `Answer` for one question, a list of answers for a list.
        """
        given = dict(documents) if isinstance(documents, dict) else {"documents": documents, "questions": questions}
        asked = given.pop("questions", None)
        if asked is None:
            raise TypeError('there is no question: call qa(document, questions), or qa.read(document).ask("...")')
        return self.read(given.get("documents"), text=given.get("text"), **kwargs).ask(asked)

    def read(
        self,
        documents: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        *,
        text: str | None = None,
        query_aware: bool = False,
        question: str | None = None,
        **settings: Any,
    ) -> Document:
        """Read a document, in chunks, and compress it once.

        Args:
            documents: a file or several: .txt, .md, .html, .pdf.
            text: a text, instead of files.
            query_aware: compress with the question in sight. What is kept then serves that question only, and every
                report says so.
            question: the question, for `query_aware`.
            **settings: those of the pipeline, for this document.

        Returns:
            A `Document`.

        Raises:
            ValueError: for files that cannot be read, a text with nothing in it, or one that is longer than the
                model's positions.
            OSError: for a file that cannot be opened.
        """
        parameters = {**self._forward_params, **self._sanitize_parameters(**settings)[1]}
        compression = self._check_compression(parameters.get("kv", KVArguments()))
        if query_aware != (question is not None):
            raise ValueError(
                "query_aware=True needs question=..., the one to compress for"
                if query_aware
                else "a question compresses the document for it alone: say query_aware=True, or ask it afterwards"
            )
        content, names = _content(documents, text)
        inputs = self.preprocess(content, question=None if question is None else check_question(question))
        check_length(
            self.model,
            document=inputs["document_tokens"],
            question=inputs["question_tokens"] or None,
            answer=parameters.get("max_new_tokens", MAX_NEW_TOKENS),
        )
        made = self.forward(
            inputs,
            compression=compression,
            chunk_size=parameters.get("chunk_size", CHUNK_SIZE),
            compress_chunks=parameters.get("compress_chunks", False),
        )
        return self.postprocess(made, names=names, content=content, question=question)

    def load(self, path: str | os.PathLike[str]) -> Document:
        """Go on with a document that was saved.

        Raises:
            ValueError: if the file is damaged, or of another model or tokenizer.
            OSError: if it cannot be opened.
        """
        return Document(self, *load_document(path, self))

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, unless `ask` says otherwise."""
        return int(self._forward_params.get("max_new_tokens", MAX_NEW_TOKENS))

    def question_ids(self, question: str) -> list[int]:
        """Tokens of a question and of what leads to its answer."""
        return self.prompt_format.question_ids(self.tokenizer, question)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(parameters) - {*_KV, *_OWN, *_IGNORED})
        if unknown:
            raise TypeError(
                f"reading a document has no argument {', '.join(map(repr, unknown))}: it takes "
                f"{', '.join((*_KV, *_OWN))}"
            )
        given: dict[str, Any] = {name: parameters[name] for name in _OWN if parameters.get(name) is not None}
        for name in {"chunk_size", "max_new_tokens"} & set(given):
            check_count(name, given[name])
        if not isinstance(given.get("compress_chunks", False), bool):
            raise TypeError(f"compress_chunks must be True or False, got {given['compress_chunks']!r}")
        call = KVArguments.of(parameters)
        if call.given:
            own: dict[str, Any] = getattr(self, "_forward_params", {})  # not there yet while the pipeline is made
            given["kv"] = own.get("kv", KVArguments()).overridden_by(call)
        return {}, given, {}

    def _check_compression(self, kv: KVArguments) -> Compression:
        """The compression to read with: the default where nothing was said.

        Raises:
            ValueError: for one that does not exist or cannot work.
        """
        if kv.compression is None:
            budget = DEFAULT_BUDGET if kv.budget is None else kv.budget
            kv = KVArguments(METHOD, budget, kv.options)
        compression = kv.resolve()
        HeadKVCache(self.model, compression)  # refuses models and budgets that cannot work
        return compression

    def preprocess(self, text: str, question: str | None = None) -> dict[str, Any]:
        """Tokens of a document, and of a question it is compressed for."""
        document = self.prompt_format.document_ids(self.tokenizer, text)
        asked = [] if question is None else self.question_ids(question)
        ids = torch.tensor([[*document, *asked]])  # [1, T]
        return {"input_ids": ids, "document_tokens": len(document), "question_tokens": len(asked)}

    def _forward(
        self, model_inputs: dict[str, Any], compression: Compression, chunk_size: int, compress_chunks: bool
    ) -> dict[str, Any]:
        ids = model_inputs["input_ids"]
        # With a question, its last token stays out: the answer begins with the forward of that token.
        read = ids[:, :-1] if model_inputs["question_tokens"] else ids
        began = time.perf_counter()
        cache = HeadKVCache(self.model, compression)
        options = {"logits_to_keep": 1} if _takes(self.model.forward, "logits_to_keep") else {}
        with nullcontext() if compress_chunks else cache.reading():
            for chunk in read.split(chunk_size, dim=1):
                self.model(input_ids=chunk, past_key_values=cache, use_cache=True, **options)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return {"cache": cache, "ids": ids, "seconds": time.perf_counter() - began}

    def postprocess(
        self, model_outputs: dict[str, Any], names: tuple[str, ...] = (), content: str = "", question: str | None = None
    ) -> Document:
        """The document, with its report."""
        cache: HeadKVCache = model_outputs["cache"]
        held, compresses = cache.report(), cache.compression.resolve().compresses
        lengths = [head for layer in held.lengths for row in layer for head in row]
        known, words = count_known_words(self.tokenizer, content)
        report = DocumentReport(
            names=names,
            method=held.method,
            budget=held.budget if compresses else None,
            options=held.options,
            query_aware=question is not None,
            question=None if question is None else question.strip(),
            tokens=held.tokens_seen,
            kept=sum(lengths) / len(lengths),
            nbytes=held.nbytes,
            nbytes_full=held.nbytes_full,
            nbytes_peak=held.nbytes_peak,
            seconds=model_outputs["seconds"],
            known_words=known,
            words=words,
        )
        return Document(self, cache, model_outputs["ids"][0].tolist(), report)


def _content(documents: Any, text: str | None) -> tuple[str, tuple[str, ...]]:
    """The text to read and the files it came from."""
    from headkv_mm.pipelines.reading import read_documents

    if (documents is None) == (text is None):
        raise ValueError("give files, or text=..., one of them")
    if text is not None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("the text is empty: there is nothing to read")
        return text.strip(), ()
    paths = [documents] if isinstance(documents, str | os.PathLike) else list(documents)
    return read_documents(paths), tuple(os.fspath(path) for path in paths)


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
