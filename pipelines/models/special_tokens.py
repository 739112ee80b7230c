# SPDX-License-Identifier: Apache-2.0
"""Tokens that a processor writes around images and that no prompt may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def without_special_tokens(prompt: str, processor: Any, names: Sequence[str]) -> str:
    """The prompt, if it holds none of the processor's own tokens.

    Args:
        prompt: what a user wrote.
        processor: has the tokens as attributes.
        names: of the attributes; those that are missing are skipped.

    Raises:
        ValueError: if it does.
    """
    for token in filter(None, (getattr(processor, name, None) for name in names)):
        if token in prompt:
            raise ValueError(f"the prompt holds {token!r}, which the processor writes itself: leave it out")
    return prompt
