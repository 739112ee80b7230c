# SPDX-License-Identifier: Apache-2.0
"""Compressed documents as files: the cache with what is needed to go on asking."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from headkv_mm.cache import HeadKVCache
from headkv_mm.pipelines.answers import DocumentReport

if TYPE_CHECKING:
    from headkv_mm.pipelines.document import Document
    from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline

FORMAT = 1
_KEY = "document"


def save_document(document: Document, path: str | os.PathLike[str], pipeline: LongDocumentQAPipeline) -> None:
    """Write a document's cache, tokens and report as one safetensors file."""
    record = {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(pipeline),
        "ids": document.ids,
        "report": document.report.to_dict(),
    }
    document.cache.save(path, pipeline.model, extra={_KEY: record})


def load_document(
    path: str | os.PathLike[str], pipeline: LongDocumentQAPipeline
) -> tuple[HeadKVCache, list[int], DocumentReport]:
    """Read what `save_document` wrote.

    Returns:
        The cache, its tokens, and the report of reading.

    Raises:
        ValueError: if it is no such file, cut or edited, or of another model, tokenizer or prompt format.
        OSError: if it cannot be opened.
    """
    name = os.fspath(path)
    cache = HeadKVCache.load(path, pipeline.model)
    record = (getattr(cache, "extra", None) or {}).get(_KEY)
    if not isinstance(record, dict):
        raise ValueError(f"{name} holds a cache but no document: load it with HeadKVCache.load")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{name} has document format {record.get('format')!r}, expected {FORMAT}: read the document again"
        )
    if record.get("tokenizer") != tokenizer_fingerprint(pipeline):
        raise ValueError(
            f"{name} was saved with another tokenizer or chat template: load it with the same, or read the document "
            "again"
        )
    try:
        ids = [int(token) for token in record["ids"]]
        report = _report(record["report"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is damaged: its description is incomplete; read the document again") from error
    if len(ids) - report.query_aware != cache.get_seq_length():  # see `Document.ids`
        raise ValueError(
            f"{name} is damaged: it lists {len(ids)} tokens and its cache holds {cache.get_seq_length()}; read the "
            "document again"
        )
    return cache, ids, report


def tokenizer_fingerprint(pipeline: LongDocumentQAPipeline) -> str:
    """A hash of the vocabulary and of the prompt around document and question."""
    prompt = pipeline.prompt_format
    content: list[Any] = [
        sorted(pipeline.tokenizer.get_vocab().items()),
        [prompt.before, prompt.between, prompt.after, prompt.chat],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _report(record: dict[str, Any]) -> DocumentReport:
    known = {name: value for name, value in record.items() if name != "ratio"}
    return DocumentReport(**{**known, "names": tuple(known["names"])})
