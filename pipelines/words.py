# SPDX-License-Identifier: Apache-2.0
"""How many words of a text a tokenizer knows."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\w+")


def count_known_words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int]:
    """Words of a text that the tokenizer can write, and all words; numbers are words too.

    Tokenizers that fall back on bytes or letters know every word.
    """
    words = Counter(_WORD.findall(text))
    total = sum(words.values())
    unknown = tokenizer.unk_token_id
    if unknown is None or not words:
        return total, total
    distinct = list(words)
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    return sum(words[word] for word, ids in zip(distinct, encoded) if ids and unknown not in ids), total
