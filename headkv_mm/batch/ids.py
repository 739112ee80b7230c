# SPDX-License-Identifier: Apache-2.0
"""Ids of prompts, which become file names."""

from __future__ import annotations

import unicodedata

_FORBIDDEN = '<>:"/\\|?*'
_LONGEST = 200  # bytes; file systems take 255, and a seed and a suffix come on top


def check_id(text: str) -> str:
    """An id that is a safe file name on every system.

    Args:
        text: what the user wrote.

    Returns:
        The same text.

    Raises:
        ValueError: if it is empty, too long, hidden, would leave the folder, or has characters that some file systems
            refuse.
    """
    if not text:
        raise ValueError("the id is empty")
    if text.startswith(".") or text != text.strip() or text.endswith("."):
        raise ValueError(f"id {text!r} begins or ends with a dot or a space: it is used as a file name")
    bad = sorted({sign for sign in text if sign in _FORBIDDEN or unicodedata.category(sign) in ("Cc", "Cs")})
    if bad:
        raise ValueError(f"id {text!r} has {', '.join(map(repr, bad))}: it is used as a file name inside the folder")
    length = len(text.encode("utf-8"))
    if length > _LONGEST:
        raise ValueError(f"id {text[:20]!r}... has {length} bytes, at most {_LONGEST} fit a file name")
    return text


def same_file(text: str) -> str:
    """What two ids have in common if some file system takes them for one name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
