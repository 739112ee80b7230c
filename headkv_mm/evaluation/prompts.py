# SPDX-License-Identifier: Apache-2.0
"""Prompts of a batch of captions, with the unconditional rows that guidance needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts of B images.

    Attributes:
        ids, mask: int64 [B, P], padded on the left.
        negative_ids, negative_mask: int64 [B, P] of the unconditional prompt.
        guidance: strength of classifier-free guidance; 1 means off, and then there are no unconditional rows.
    """

    ids: Tensor
    mask: Tensor
    negative_ids: Tensor
    negative_mask: Tensor
    guidance: float

    @property
    def row_ids(self) -> Tensor:
        """Prompts of all rows: [B, P], or [2B, P] with guidance, the conditional ones first."""
        return self.ids if self.guidance == 1 else torch.cat((self.ids, self.negative_ids))

    @property
    def row_mask(self) -> Tensor:
        """The mask of `row_ids`."""
        return self.mask if self.guidance == 1 else torch.cat((self.mask, self.negative_mask))

    def rows(self, which: slice) -> Prompts:
        """The prompts of some of the images."""
        return Prompts(
            self.ids[which], self.mask[which], self.negative_ids[which], self.negative_mask[which], self.guidance
        )

    def as_rows(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] of the images for all rows."""
        return tokens if self.guidance == 1 else tokens.repeat(2, 1)

    def guided(self, scores: Tensor) -> Tensor:
        """Scores [B, K] from those of all rows."""
        if self.guidance == 1:
            return scores
        conditional, unconditional = scores.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


def encode(model: Any, captions: Sequence[str]) -> Prompts:
    """Prompts for a model of the embedded world.

    Raises:
        ValueError: if the model has other words.
    """
    from headkv_mm.demo.tokenizer import WORDS, build_tokenizer

    config = model.config
    words = config.get_text_config().vocab_size - config.codebook_size
    if words != len(WORDS):
        raise ValueError(
            f"the evaluation asks for coloured shapes in {len(WORDS)} words, but this model has {words}: "
            "use the embedded model, or one trained by scripts/train_demo_image.py"
        )
    encoded = build_tokenizer(config.codebook_size)(list(captions), padding="max_length", return_tensors="pt")
    device = model.device
    ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
    null = [config.bos_token_id, config.null_token_id, config.boi_token_id]
    negative_ids = torch.full_like(ids, config.pad_token_id)
    negative_ids[:, -len(null) :] = torch.tensor(null, device=device)
    negative_mask = torch.zeros_like(mask)
    negative_mask[:, -len(null) :] = 1
    return Prompts(ids, mask, negative_ids, negative_mask, float(model.generation_config.guidance_scale or 1.0))
