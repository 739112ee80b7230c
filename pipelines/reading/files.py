# SPDX-License-Identifier: Apache-2.0
"""Files of several kinds to one text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from headkv_mm.pipelines.reading.decoding import decode_text
from headkv_mm.pipelines.reading.html import declared_encoding, html_text
from headkv_mm.pipelines.reading.pdf import is_pdf, pdf_text

HTML = (".html", ".htm", ".xhtml")
PDF = (".pdf",)
SUFFIXES = (".txt", ".md", ".markdown", ".rst", *HTML, *PDF)
_OTHER = {
    ".doc", ".docx", ".odt", ".rtf", ".epub", ".ppt", ".pptx", ".xls", ".xlsx", ".png", ".jpg", ".jpeg", ".zip", ".gz",
}  # fmt: skip


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> str:
    """The text of one or several files.

    Args:
        paths: files; several are joined in this order, each under its file name as a heading.

    Raises:
        ValueError: for no file at all, or one that `read_document` refuses.
        OSError: for a file that cannot be opened.
    """
    if not paths:
        raise ValueError("there is no document: give at least one file")
    texts = [read_document(path) for path in paths]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{Path(path).name}\n\n{text}" for path, text in zip(paths, texts))


def read_document(path: str | os.PathLike[str]) -> str:
    """The text of a file: .pdf by its pages, .html without its markup, everything else as it stands.

    Args:
        path: the file. A PDF file is known by its first bytes too.

    Raises:
        ValueError: for an empty, binary, encrypted or damaged file, in one line with what to do.
        OSError: if it cannot be opened.
    """
    file = Path(path)
    name, suffix = str(file), file.suffix.lower()
    if file.is_dir():
        raise ValueError(f"{name} is a folder: give its files")
    data = file.read_bytes()
    if not data:
        raise ValueError(f"{name} is empty: give a file with text in it")
    if suffix in PDF or is_pdf(data):
        return pdf_text(data, name)
    if suffix in _OTHER:
        raise ValueError(f"{name} is not read here: save it as .txt, .md, .html or .pdf")
    if suffix in HTML:
        text = html_text(decode_text(data, name, encoding=declared_encoding(data)))
    else:
        text = decode_text(data, name).strip()
    if not text:
        raise ValueError(f"{name} has no text in it: give a file with text in it")
    return text
