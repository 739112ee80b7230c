# SPDX-License-Identifier: Apache-2.0
"""Fidelity to the full cache: both caches read the same image, and their next-token distributions are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headkv_mm.evaluation.prompts import Prompts


@dataclass(frozen=True)
class Fidelity:
    """Comparison token by token.

    Attributes:
        agreement: [B, N] bool, both caches have the same best token.
        kl: [B, N] float64, KL(full || compressed) in nats of the distributions that are sampled from at temperature 1
            (after guidance, before temperature and top-k).
    """

    agreement: Tensor
    kl: Tensor


@torch.no_grad()
def forced_scores(
    model: Any, prompts: Prompts, tokens: Tensor, cache: Any, on_token: Callable[[int], object] = lambda count: None
) -> Iterator[Tensor]:
    """Scores of every image token while the image is given, token by token as in generation.

    Args:
        model: a LlamaGen model.
        prompts: of B images.
        tokens: int64 [B, N], the image that is read.
        cache: an empty cache, for `prompts.rows` rows.
        on_token: called with 1 after every step.

    Yields:
        [B, K] float32, guided scores of token i, for i = 0 .. N - 1.
    """
    ids, mask, columns = prompts.row_ids, prompts.row_mask, prompts.row_ids.shape[1]
    steps = tokens.shape[1]
    full_mask = torch.cat((mask, mask.new_ones(mask.shape[0], steps)), dim=1)
    inputs = ids
    for index in range(steps):
        logits = model(
            input_ids=inputs,
            attention_mask=full_mask[:, : columns + index],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        yield prompts.guided(logits.float())
        inputs = prompts.as_rows(tokens[:, index : index + 1])
        on_token(1)


def compare(full: Tensor, compressed: Iterator[Tensor]) -> Fidelity:
    """Compare the scores of the full cache [B, N, K] with those of another, one step at a time."""
    agreement = torch.empty(full.shape[:2], dtype=torch.bool, device=full.device)
    kl = torch.empty(full.shape[:2], dtype=torch.float64, device=full.device)
    for index, scores in enumerate(compressed):
        wanted = full[:, index]
        agreement[:, index] = wanted.argmax(-1) == scores.argmax(-1)
        kl[:, index] = divergence(wanted, scores)
    return Fidelity(agreement.cpu(), kl.cpu())


def divergence(wanted: Tensor, scores: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(scores)) of [B, K] scores, [B] float64; exactly 0 for equal scores."""
    # Equal scores give equal log-probabilities, so their difference is exactly 0 and needs no clamp.
    log_wanted, log_scores = wanted.double().log_softmax(-1), scores.double().log_softmax(-1)
    return (log_wanted.exp() * (log_wanted - log_scores)).sum(-1)


def first_affected_token(first_eviction_rows: int, row: int) -> int:
    """Index of the first image token whose prediction an eviction can change.

    Eviction follows the step that reads a row's last token, and that step, which predicts the first token of the next
    row, still sees everything.
    """
    return first_eviction_rows * row + 1
