# SPDX-License-Identifier: Apache-2.0
"""Bytes to text: which encoding a file has, and whether it is text at all."""

from __future__ import annotations

import codecs
import unicodedata

# The longer mark first: that of UTF-32 little-endian begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LAYOUT = "\t\n\r\f\v"
_MOST_LETTERS_BEYOND_ASCII = 0.3  # of a latin-1 text; Western languages stay far below


def decode_text(data: bytes, name: str, *, encoding: str | None = None) -> str:
    """Decode the bytes of a text file.

    A byte order mark goes first, then `encoding`, then UTF-8. What is none of them is taken for latin-1 only if it then
    looks like text of a Western language: every byte sequence is valid latin-1.

    Args:
        data: the file's bytes.
        name: the file, for messages.
        encoding: what the file says about itself, if anything.

    Returns:
        The text; every kind of line end is a line feed.

    Raises:
        ValueError: if the bytes are no text, with what to do.
    """
    for mark, marked in _MARKS:
        if data.startswith(mark):
            try:
                return _clean(data.decode(marked), name)
            except UnicodeDecodeError:
                raise ValueError(f"{name} says it is {marked} but is damaged: save it again as UTF-8") from None
    for tried in (encoding, "utf-8"):
        if tried is None:
            continue
        try:
            return _clean(data.decode(tried), name)
        except (UnicodeDecodeError, LookupError):
            continue
    text = data.decode("latin-1")
    beyond = [character for character in text if ord(character) > 127]
    if any(unicodedata.category(character) == "Cc" for character in beyond) or (
        len(beyond) > _MOST_LETTERS_BEYOND_ASCII * len(text)
    ):
        raise ValueError(f"{name} is no text in UTF-8, UTF-16 or latin-1: save it as UTF-8")
    return _clean(text, name)


def _clean(text: str, name: str) -> str:
    """The text with plain line ends, or an error if it holds control characters, as binary files do."""
    for character in set(text):
        if unicodedata.category(character) == "Cc" and ord(character) < 128 and character not in _LAYOUT:
            raise ValueError(f"{name} is a binary file, not text: give a .txt, .md, .html or .pdf file")
    return text.replace("\r\n", "\n").replace("\r", "\n")
