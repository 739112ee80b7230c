# SPDX-License-Identifier: Apache-2.0
"""Documents as text: plain text, Markdown, HTML and PDF files."""

from __future__ import annotations

from headkv_mm.pipelines.reading.files import SUFFIXES, read_document, read_documents

__all__ = ["SUFFIXES", "read_document", "read_documents"]
