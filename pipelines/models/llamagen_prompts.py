# SPDX-License-Identifier: Apache-2.0
"""The prompts that a LlamaGen model reads: words of its own vocabulary, a class, or features of a text encoder."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASS = re.compile(r"class (\d+)")


@dataclass(frozen=True, eq=False)
class FeaturePrompt:
    """Features of one text, as the text encoder gave them.

    Attributes:
        features: [n, C], without padding.
        name: what stands for the prompt in outputs.
    """

    features: torch.Tensor
    name: str

    def __str__(self) -> str:
        return self.name


class PromptReader(ABC):
    """Checks prompts and turns them into arguments of `LlamaGenForConditionalGeneration.generate`.

    Attributes:
        argument: name of the argument that holds the prompts.
        negative_argument: name of the argument that holds the negative prompt.
    """

    argument = "input_ids"
    negative_argument = "negative_prompt_ids"

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Keep what the prompts are read with."""
        self.config = model.config
        self.tokenizer = tokenizer

    @abstractmethod
    def check(self, prompt: str) -> str:
        """The prompt as the model reads it, or a ValueError in one line."""

    @abstractmethod
    def read(self, prompts: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Checked prompts as a tensor [B, P, ...] and its mask int64 [B, P], padded on the left."""


class WordReader(PromptReader):
    """Prompts in the model's own vocabulary.

    A model whose words are those of the scene grammar gets its prompts through that grammar, so that "a red circle
    top left" works; any other tokenizer reads the prompt as it stands.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Find the tokenizer: the one given, the one in the model's folder, or the scene vocabulary."""
        super().__init__(model, _own_tokenizer(model) if tokenizer is None else tokenizer)
        from headkv_mm.demo.tokenizer import WORDS

        self._speaks_scenes = set(self.tokenizer.get_vocab()) == set(WORDS)

    def check(self, prompt: str) -> str:
        """The canonical caption, or the prompt itself if it is short enough."""
        if self._speaks_scenes:
            from headkv_mm.demo.captions import parse_caption

            return str(parse_caption(prompt))
        limit = self.config.max_prompt_length
        length = len(self.tokenizer(prompt)["input_ids"])
        if length > limit:
            raise ValueError(f"the prompt has {length} tokens, this model reads at most {limit}: shorten it")
        return prompt

    def read(self, prompts: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask int64 [B, P]."""
        encoded = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.config.max_prompt_length,
            padding_side="left",
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]


class ClassReader(PromptReader):
    """Prompts "class 207"."""

    def check(self, prompt: str) -> str:
        """The prompt, if it is "class" and a number in range."""
        found = _CLASS.fullmatch(" ".join(prompt.lower().split()))
        if not found:
            raise ValueError(
                f"this model draws classes, not texts: pass class_labels=..., numbers from 0 to "
                f"{self.config.num_classes - 1}, or a prompt such as 'class 0', not {prompt!r}"
            )
        return self.of_labels([int(found[1])])[0]

    def of_labels(self, labels: Sequence[int]) -> list[str]:
        """The prompts of class labels.

        Raises:
            ValueError: for a label out of range.
            TypeError: for one that is no integer.
        """
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int):
                raise TypeError(f"a class label must be an integer, got {label!r}")
            if not 0 <= label < self.config.num_classes:
                raise ValueError(f"class labels go from 0 to {self.config.num_classes - 1}, got {label}")
        return [f"class {label}" for label in labels]

    def read(self, prompts: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask int64 [B, 1]."""
        ids = torch.tensor([[self.config.codebook_size + int(prompt.split()[1])] for prompt in prompts])
        return ids, torch.ones_like(ids)


class FeatureReader(PromptReader):
    """Texts through a text encoder, or features that somebody else's encoder gave."""

    argument = "text_features"
    negative_argument = "negative_text_features"

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """There is no text encoder yet."""
        super().__init__(model, tokenizer)
        self._model = model
        self._encoder: Any = None

    def bind_text_encoder(self, encoder: Any) -> Any:
        """Read texts with a T5 encoder: a folder with encoder and tokenizer, or a model (and `tokenizer=`).

        Returns:
            The loaded encoder.

        Raises:
            ValueError: if it cannot be read, or its features have another width.
        """
        from headkv_mm.pipelines.models.text_encoder import TextEncoder

        bound = TextEncoder.of(encoder, self.tokenizer, limit=self.config.max_prompt_length)
        if bound.feature_size != self.config.feature_size:
            raise ValueError(
                f"this model reads text features of width {self.config.feature_size}, the text encoder gives "
                f"{bound.feature_size}: use the one it was trained with"
            )
        self._encoder = bound.to(input_device(self._model))
        return bound.model

    def check(self, prompt: str) -> str:
        """The prompt, if there is an encoder and it is short enough."""
        if self._encoder is None:
            raise ValueError(
                "this model reads the features of a T5 text encoder: pass text_encoder= (its folder) when the pipeline "
                "is made, or features= with a call"
            )
        return str(self._encoder.check(prompt))

    def of_features(self, features: Any, mask: torch.Tensor | None) -> list[FeaturePrompt]:
        """The prompts of features [B, n, C] with their mask [B, n], or of a list of features [n, C].

        Raises:
            ValueError: for another shape, or a row without any feature.
            TypeError: for anything but tensors.
        """
        rows = list(features) if isinstance(features, (list, tuple, torch.Tensor)) else None
        if not rows or not all(isinstance(row, torch.Tensor) for row in rows):
            raise TypeError("features must be a tensor [B, n, C] or a list of tensors [n, C], and not empty")
        if mask is not None:
            wanted = (len(rows), len(rows[0]))
            if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != wanted:
                found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"feature_mask must be a tensor of shape {wanted}, got {found}")
            rows = [row[keep.bool().to(row.device)] for row, keep in zip(rows, mask)]
        limit, width = self.config.max_prompt_length, self.config.feature_size
        for row in rows:
            if row.dim() != 2 or row.shape[1] != width or not 1 <= len(row) <= limit or not row.is_floating_point():
                raise ValueError(
                    f"features of a text must have shape [1 to {limit}, {width}] and be real numbers, got "
                    f"{tuple(row.shape)}"
                )
        return [FeaturePrompt(row, f"features {index}") for index, row in enumerate(rows)]

    @torch.no_grad()
    def read(self, prompts: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, P, C] and mask int64 [B, P]."""
        texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
        encoded = dict(zip(texts, self._encoder.encode(texts))) if texts else {}
        rows = [encoded[prompt] if isinstance(prompt, str) else prompt.features for prompt in prompts]
        padded = rows[0].new_zeros(len(rows), self.config.max_prompt_length, self.config.feature_size)
        mask = torch.zeros(padded.shape[:2], dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, -len(row) :] = row.to(padded)
            mask[index, -len(row) :] = 1
        return padded, mask


def reader_for(model: PreTrainedModel, tokenizer: Any) -> PromptReader:
    """The reader for a model's kind of prompts."""
    kinds: dict[str, type[PromptReader]] = {"words": WordReader, "class": ClassReader, "text": FeatureReader}
    return kinds[model.config.conditioning](model, tokenizer)


def _own_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer that lies in the model's folder, or the scene vocabulary if its size fits.

    Raises:
        ValueError: if there is neither.
    """
    folder = str(getattr(model, "name_or_path", "") or "")
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    from headkv_mm.demo.tokenizer import WORDS, build_tokenizer

    first_word = model.config.codebook_size
    if model.config.get_text_config().vocab_size - first_word == len(WORDS):
        return build_tokenizer(first_word)
    raise ValueError("this LlamaGen model came without a tokenizer: pass tokenizer=")
