# SPDX-License-Identifier: Apache-2.0
"""Example documents with questions that ship with the library, and how they were made."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from headkv_mm.demo.documents.document import Document
from headkv_mm.demo.documents.tasks import make_document
from headkv_mm.demo.text_rows import token_ids

EXAMPLE_LENGTHS: dict[str, int] = {"notes-500": 500, "notes-1000": 1000, "notes-2000": 2000}
SENTENCES_PER_LINE = 5
_FOLDER = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class ExampleDocument:
    """Where an example lies.

    Attributes:
        name: "notes-500" and so on; the number is about its length in tokens of the embedded model.
        document: text file.
        questions: text file with one question per line.
    """

    name: str
    document: Path
    questions: Path


def example_documents(folder: Path | None = None) -> tuple[ExampleDocument, ...]:
    """The example documents, the shortest first.

    Args:
        folder: where they lie; the folder that ships with the library if left out.

    Raises:
        FileNotFoundError: if one is missing.
    """
    folder = _FOLDER if folder is None else folder
    examples = tuple(
        ExampleDocument(name, folder / f"{name}.txt", folder / f"{name}.questions.txt") for name in EXAMPLE_LENGTHS
    )
    for example in examples:
        for path in (example.document, example.questions):
            if not path.is_file():
                raise FileNotFoundError(f"the example {path} is missing: reinstall headkv-mm")
    return examples


def make_example(name: str) -> Document:
    """The document of an example with its questions and answers; its names were not in the training of the model."""
    length = EXAMPLE_LENGTHS[name]
    return make_document("mixed", random.Random(name), length, lambda text: len(token_ids(text)) + 1)


def write_examples(folder: Path) -> None:
    """Write all examples into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXAMPLE_LENGTHS:
        document = make_example(name)
        sentences = [f"{sentence.removesuffix('.')}." for sentence in document.text.split(". ")]
        starts = range(0, len(sentences), SENTENCES_PER_LINE)
        lines = [" ".join(sentences[start : start + SENTENCES_PER_LINE]) for start in starts]
        _write(folder / f"{name}.txt", lines)
        _write(folder / f"{name}.questions.txt", [question.text for question in document.questions])


def _write(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, path)
