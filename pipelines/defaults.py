# SPDX-License-Identifier: Apache-2.0
"""What the text pipelines do unless told otherwise. Imports nothing heavy, so that a command line can name it."""

from __future__ import annotations

from typing import Any

WITH_TABLE, WITHOUT_TABLE = "headkv-r2", "keydiff"
"""The best of the committed evaluation where the document is compressed before a question is known, for models with a
head table (the embedded one ships with its table) and for others."""
TABLE_OPTIONS = {"scorer": "keydiff"}
"""The table says how much a head keeps; which entries, their keys: the last queries do not know the question."""
DEFAULT_BUDGET = 0.25
CHUNK_SIZE = 1024  # tokens of a document that go through the model at once
MAX_NEW_TOKENS = 256
QUESTION_ROOM = 64  # positions left free behind a document, for a question of ordinary length


def default_compression(model: Any) -> tuple[str, dict[str, Any]]:
    """Method and options for documents, as the evaluation of text has decided them.

    Args:
        model: a transformers model.
    """
    from headkv_mm.head_tables import head_table_for

    try:
        head_table_for(model)
    except ValueError:
        return WITHOUT_TABLE, {}
    return WITH_TABLE, TABLE_OPTIONS
