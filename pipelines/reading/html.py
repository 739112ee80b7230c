# SPDX-License-Identifier: Apache-2.0
"""The readable text of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN = {"script", "style", "template", "noscript", "head", "svg", "math", "iframe", "object", "select"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html",
    "main", "nav", "ol", "p", "pre", "section", "summary", "table", "ul",
}  # fmt: skip
_LINES = {"br", "li", "tr"}
_CELLS = {"td", "th"}
_DECLARED = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)
_SEARCHED = 2048  # bytes in which a page must state its encoding


def html_text(page: str) -> str:
    """What a reader sees of a page: no markup, scripts, styles and titles of windows.

    Paragraphs, headings and the like are set apart by a blank line, items and table rows by a line break; the text of
    `pre` keeps its lines.

    Args:
        page: HTML source, however broken.
    """
    parser = _Text()
    parser.feed(page)
    parser.close()
    return parser.text


def declared_encoding(data: bytes) -> str | None:
    """The encoding that a page states in a `meta` tag, if any; UTF-16 cannot be stated there, only by its mark."""
    found = _DECLARED.search(data[:_SEARCHED])
    stated = found.group(1).decode("ascii").lower() if found else None
    return None if stated is None or stated.startswith("utf-16") else stated


class _Text(HTMLParser):
    """Collects visible text in pieces; line breaks are pieces of their own."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._hidden: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag in _BLOCKS and self._hidden == ["head"]:
            self._hidden.clear()  # a head that was never closed ends where the page begins
        if tag == "pre":
            self._pre += 1
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        if tag not in _LINES:
            self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)  # `<script/>` hides nothing

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._pieces.append(data if self._pre else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if self._hidden:
            return
        if tag in _BLOCKS:
            self._pieces.append("\n\n")
        elif tag in _LINES:
            self._pieces.append("\n")
        elif tag in _CELLS:
            self._pieces.append(" ")

    @property
    def text(self) -> str:
        """Everything collected, without blanks at the ends of lines and without piles of empty lines."""
        lines = [re.sub(r"[ \t]+", " ", line).strip() for line in "".join(self._pieces).split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
