# SPDX-License-Identifier: Apache-2.0
"""What the text pipelines do unless told otherwise. Imports nothing heavy, so that a command line can name it."""

from __future__ import annotations

METHOD = "pointed"
"""The best of the committed evaluations where a document is compressed before a question is known; without a table."""
DEFAULT_BUDGET = 0.25
CHUNK_SIZE = 1024  # tokens of a document that go through the model at once
MAX_NEW_TOKENS = 256
QUESTION_ROOM = 64  # positions left free behind a document, for a question of ordinary length
