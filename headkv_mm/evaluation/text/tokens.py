# SPDX-License-Identifier: Apache-2.0
"""Texts of a batch as tokens, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Texts of B rows.

    Attributes:
        ids, mask: int64 [B, T]; the mask is 0 on the padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def padded(cls, rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tokens:
        """Rows of different lengths, aligned at their ends."""
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return cls(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


class Encoder:
    """The tokenizer's view of documents, questions and answers.

    Documents and what follows them are tokenized apart, since a document is read before its question is known.

    Args:
        tokenizer: of transformers.

    Raises:
        ValueError: if it has no token to end an answer or to pad with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token, so answers would never end; set its eos_token"
            )
        self._eos = int(tokenizer.eos_token_id)
        self.pad = self._eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def document(self, text: str) -> list[int]:
        """A text at the beginning of a prompt, with the special tokens that belong there."""
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def following(self, text: str) -> list[int]:
        """A text that follows another."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self.document(text))

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's one line."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip().split("\n")[0].strip()
