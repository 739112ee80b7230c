# SPDX-License-Identifier: Apache-2.0
"""The text of a PDF file, page by page."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

MAGIC = b"%PDF-"
_MAGIC_WITHIN = 1024  # bytes before it that readers accept


def is_pdf(data: bytes) -> bool:
    """Whether the bytes say they are a PDF file."""
    return MAGIC in data[:_MAGIC_WITHIN]


def pdf_text(data: bytes, name: str) -> str:
    """The text of all pages, a blank line between two of them.

    Args:
        data: the file's bytes.
        name: the file, for messages.

    Raises:
        ValueError: for a file that is damaged, encrypted with a password, or has no text (a scan), with what to do.
    """
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    if not is_pdf(data):
        raise ValueError(f"{name} is no PDF file, whatever its name says: it has no {MAGIC.decode()} at its start")
    with _quiet():
        try:
            reader = PdfReader(io.BytesIO(data))
            locked = reader.is_encrypted and not reader.decrypt("")  # many files lock only printing and copying
            pages = [] if locked else [page.extract_text() or "" for page in reader.pages]
        except DependencyError:
            raise ValueError(
                f"{name} is encrypted: save it without encryption, or `pip install cryptography` to read files that "
                "open without a password"
            ) from None
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # pypdf raises anything from KeyError to RecursionError on damaged files
            raise ValueError(
                f"{name} is damaged or no complete PDF file ({type(error).__name__}): download or export it again"
            ) from error
    if locked:
        raise ValueError(f"{name} is encrypted with a password: save a copy without one")
    if not pages:
        raise ValueError(f"{name} has no pages: download or export it again")
    text = "\n\n".join(filter(None, map(_page, pages)))
    if not text:
        raise ValueError(f"{name} has no text on its {len(pages)} page(s), as scans do: run text recognition on it")
    return text


def _page(text: str) -> str:
    """A page with words that were divided at the end of a line put together again."""
    text = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", text.replace("\r\n", "\n").replace("\x00", ""))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without pypdf's remarks about files that keep few of the rules; what matters becomes an error."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
