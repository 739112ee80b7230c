# SPDX-License-Identifier: Apache-2.0
"""Generated documents with questions, for training the embedded language model and for evaluating any model."""

from __future__ import annotations

from headkv_mm.demo.documents.document import Document, prompt_text, question_text, score_answer
from headkv_mm.demo.documents.sentences import Question
from headkv_mm.demo.documents.tasks import DEPTH_TASKS, TASKS, make_document
from headkv_mm.demo.documents.words import is_held_out

__all__ = [
    "DEPTH_TASKS",
    "TASKS",
    "Document",
    "Question",
    "is_held_out",
    "make_document",
    "prompt_text",
    "question_text",
    "score_answer",
]
