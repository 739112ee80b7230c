# SPDX-License-Identifier: Apache-2.0
"""Pipelines in the style of transformers whose models run on a compressed KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv_mm.pipelines.answering import AnswerStream
    from headkv_mm.pipelines.answers import Answer, DocumentReport
    from headkv_mm.pipelines.document import Document
    from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline
    from headkv_mm.pipelines.factory import pipeline
    from headkv_mm.pipelines.image_text_to_text import KVImageTextToTextPipeline
    from headkv_mm.pipelines.outputs import GenerationReport, ImageOutput
    from headkv_mm.pipelines.text_generation import KVTextGenerationPipeline
    from headkv_mm.pipelines.text_reports import TextReport
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

_HOMES = {
    "Answer": "answers",
    "AnswerStream": "answering",
    "Document": "document",
    "DocumentReport": "answers",
    "GenerationReport": "outputs",
    "ImageOutput": "outputs",
    "KVImageTextToTextPipeline": "image_text_to_text",
    "KVTextGenerationPipeline": "text_generation",
    "LongDocumentQAPipeline": "document_qa",
    "TextReport": "text_reports",
    "TextToImagePipeline": "text_to_image",
    "pipeline": "factory",
}

__all__ = [
    "Answer",
    "AnswerStream",
    "Document",
    "DocumentReport",
    "GenerationReport",
    "ImageOutput",
    "KVImageTextToTextPipeline",
    "KVTextGenerationPipeline",
    "LongDocumentQAPipeline",
    "TextReport",
    "TextToImagePipeline",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
