# SPDX-License-Identifier: Apache-2.0
"""T5 features of prompts, as text-conditional LlamaGen models read them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUOTES = str.maketrans("`´«»“”¨‘’", '"""""""\'\'')
_DASHES = re.compile(r"[\u2010-\u2015\u2212\uFE58\uFE63\uFF0D]+")

# A call notes its padding on the tokenizer, so two threads must not be in it at once.
_TOKENIZING = Lock()


class TextEncoder:
    """A T5 encoder with its tokenizer.

    Texts are read in lower case with plain quotes and dashes and single blanks, which is what LlamaGen's own cleaning
    of captions does to a written prompt. That code also takes web addresses, HTML and file names out of captions.

    Args:
        model: a T5 encoder, in evaluation mode.
        tokenizer: its tokenizer.
        limit: tokens of the longest text.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        self._limit = limit

    @classmethod
    def of(cls, given: Any, tokenizer: Any, limit: int) -> TextEncoder:
        """The encoder in a folder, or one that is loaded already.

        Raises:
            ValueError: if the folder holds no T5 encoder or no tokenizer, or the model comes without a tokenizer.
            TypeError: for anything else.
        """
        if isinstance(given, (str, os.PathLike)):
            return cls(_load(os.fspath(given)), _tokenizer_of(os.fspath(given), tokenizer), limit)
        encoder = given.get_encoder() if hasattr(given, "get_encoder") else None
        if encoder is None or not hasattr(getattr(encoder, "config", None), "d_model"):
            raise TypeError(f"text_encoder must be a folder or a T5 model, got {type(given).__name__}")
        if tokenizer is None:
            raise ValueError("text_encoder is a model without its tokenizer: pass tokenizer= too, or its folder")
        return cls(encoder, tokenizer, limit)

    @property
    def feature_size(self) -> int:
        """Width of the features."""
        return int(self.model.config.d_model)

    def to(self, device: torch.device) -> TextEncoder:
        """Move the encoder; half precision becomes float32 on the CPU."""
        self.model.to(device)
        if device.type == "cpu":
            self.model.float()
        return self

    def check(self, text: str) -> str:
        """The text as it is read.

        Raises:
            ValueError: if it is too long.
        """
        cleaned = _DASHES.sub("-", " ".join(text.lower().translate(_QUOTES).split()))
        with _TOKENIZING:
            length = len(self._tokenizer(cleaned)["input_ids"])
        if length > self._limit:
            raise ValueError(f"the prompt has {length} tokens, this model reads at most {self._limit}: shorten it")
        return cleaned

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Features [n, d_model] of each checked text, without padding.

        Every text is read as alone: padded to the limit, so that the sums are the same in any company.
        """
        with _TOKENIZING:
            batch = self._tokenizer(
                list(texts), padding="max_length", max_length=self._limit, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
        hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return [row[keep.bool()] for row, keep in zip(hidden, batch["attention_mask"])]


def _load(folder: str) -> Any:
    """The encoder in a folder, which may hold a whole T5 model."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, T5EncoderModel

    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"{folder} has no config.json: text_encoder must be a folder with a T5 model and its tokenizer"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "t5":
        raise ValueError(f"{folder} holds a {config.model_type} model: text_encoder must be a T5 model")
    try:
        # A whole T5 model also has a decoder; what the encoder needs must be there.
        model, info = T5EncoderModel.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the text encoder in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder} is no complete T5 encoder: {sorted(info['missing_keys'])[0]} is missing")
    return model


def _tokenizer_of(folder: str, tokenizer: Any) -> Any:
    """The tokenizer given, or the folder's."""
    if tokenizer is not None:
        return tokenizer
    from headkv_mm.pipelines.loading import load_tokenizer

    return load_tokenizer(folder)
