# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that reads character by character, for tiny models."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer(
    special: dict[str, str], first: Sequence[str] = (), last: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One id per character, padding on the left.

    Args:
        special: further special tokens by attribute name, such as {"image_token": "<image>"}.
        first, last: words whose ids come before and after all others.
    """
    words = dict.fromkeys(
        [
            *first,
            "<pad>",
            "<s>",
            "</s>",
            "<unk>",
            *special.values(),
            *string.ascii_letters,
            *string.digits,
            *" .,*'",
            *last,
        ]
    )
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=special,
    )
