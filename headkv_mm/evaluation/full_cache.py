# SPDX-License-Identifier: Apache-2.0
"""What the full cache does with its own images: the yardstick of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headkv_mm.cache import HeadKVCache
from headkv_mm.evaluation import labels
from headkv_mm.evaluation.fidelity import forced_scores
from headkv_mm.evaluation.images import Batch

OnToken = Callable[[int], object]

_READ_TOGETHER = 32  # images; their logits are float64


class FullCache:
    """The full cache's images, and what is computed from them when it is first asked for.

    Args:
        model: a LlamaGen model.
        parts: batches of captions.
        tokens: int64 [captions, N], the images that the full cache generated, in the batches' order.
    """

    def __init__(self, model: Any, parts: list[Batch], tokens: Tensor) -> None:
        self._model, self._parts = model, parts
        self.tokens = list(tokens.to(model.device).split([len(part.scenes) for part in parts]))
        """int64 [B, N] for every batch."""
        self._scores: list[Tensor] | None = None
        self._watching: Any = None
        self._needed: dict[Any, tuple[Tensor, Tensor]] = {}

    @property
    def has_scores(self) -> bool:
        """Whether `scores` will return at once."""
        return self._scores is not None

    def scores(self, on_token: OnToken = lambda count: None) -> list[Tensor]:
        """Scores of every token, [B, N, K] float32 for every batch; 0.4 MB per caption with the embedded model."""
        if self._scores is None:
            scores = []
            for part, tokens in zip(self._parts, self.tokens, strict=True):
                cache = HeadKVCache(self._model, "none")
                scores.append(torch.stack(list(forced_scores(self._model, part.prompts, tokens, cache, on_token)), 1))
            self._scores = scores
        return self._scores

    def tokens_needed(self, rows: tuple[int, int], **settings: Any) -> tuple[Tensor, Tensor]:
        """`labels.tokens_needed` of all captions after two rows, each [layers, captions, KV heads, taus]."""
        key = (rows, tuple(sorted(settings.items())))
        if key not in self._needed:
            if self._watching is None:
                self._watching = labels.watching_copy(self._model)
            parts = []
            for part, tokens in zip(self._parts, self.tokens, strict=True):
                for first in range(0, len(tokens), _READ_TOGETHER):
                    some = slice(first, first + _READ_TOGETHER)
                    parts.append(
                        labels.tokens_needed(self._watching, part.prompts.rows(some), tokens[some], rows, **settings)
                    )
            early, late = (torch.cat([found[row] for found in parts], 1) for row in rows)
            self._needed[key] = early, late
        return self._needed[key]
