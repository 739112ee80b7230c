# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a batch, from whatever cache holds the text before the question."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from headkv_mm.evaluation.text.tokens import Tokens


class Reader:
    """Feeds a model, and counts positions and padding for it.

    Args:
        model: a causal language model of transformers.
        stop: tokens that end an answer.
    """

    def __init__(self, model: Any, stop: Collection[int]) -> None:
        self._model = model
        self._stop = torch.tensor(sorted(stop), device=model.device)
        parameters = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @torch.no_grad()
    def read(self, cache: Any, tokens: Tokens, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read tokens into a cache.

        Args:
            cache: holds what the mask `before` says.
            tokens: what follows.
            before: [B, S] mask of what was read already, or None for nothing.

        Returns:
            The mask of everything read, [B, S + T], and the scores of the next token, [B, vocabulary].
        """
        mask = tokens.mask if before is None else torch.cat([before, tokens.mask], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.ids.shape[1] :]
        output = self._model(
            input_ids=tokens.ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._last_only,
        )
        return mask, output.logits[:, -1]

    @torch.no_grad()
    def answer(self, cache: Any, mask: Tensor, scores: Tensor, limit: int, *, parts: int = 1) -> list[list[int]]:
        """Choose the likeliest token until every row has ended its answer, or `limit` tokens are there.

        Args:
            cache: takes the tokens of the answer.
            mask: [B, S] of what it was given.
            scores: [B, vocabulary] of the first token.
            limit: most tokens of an answer.
            parts: of a `JoinedCache`; a part whose rows have all ended is let go of.

        Returns:
            For every row the tokens before the one that ended it.
        """
        rows = torch.arange(scores.shape[0], device=scores.device)  # those that are still in the cache
        ended = torch.zeros_like(rows, dtype=torch.bool)
        tokens = self._stop[:1].repeat(len(rows), limit)  # [B, limit]
        for step in range(limit):
            chosen = scores.argmax(-1, keepdim=True)
            tokens[rows, step] = chosen[:, 0]
            ended |= torch.isin(chosen[:, 0], self._stop)
            if step == limit - 1 or bool(ended.all()):
                break
            over = ended.view(parts, -1).all(1)
            if parts > 1 and bool(over.any()):
                going = (~over).nonzero()[:, 0].tolist()
                cache.keep_parts(going)
                stay = torch.cat([torch.arange(len(rows), device=rows.device).chunk(parts)[part] for part in going])
                rows, ended, chosen, mask, parts = rows[stay], ended[stay], chosen[stay], mask[stay], len(going)
            mask, scores = self.read(cache, Tokens(chosen, torch.ones_like(chosen)), mask)
        stops = torch.isin(tokens, self._stop).tolist()
        return [
            row[: row_stops.index(True)] if True in row_stops else row
            for row, row_stops in zip(tokens.tolist(), stops, strict=True)
        ]


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the model's generation settings and the tokenizer."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    listed = stated if isinstance(stated, (list, tuple)) else [stated]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
