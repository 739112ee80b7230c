# SPDX-License-Identifier: Apache-2.0
"""What the text pipelines do unless told otherwise. Imports nothing, so that a command line can name it."""

from __future__ import annotations

DEFAULT_COMPRESSION = "snapkv"
DEFAULT_BUDGET = 0.25
CHUNK_SIZE = 1024  # tokens of a document that go through the model at once
MAX_NEW_TOKENS = 256
QUESTION_ROOM = 64  # positions left free behind a document, for a question of ordinary length
