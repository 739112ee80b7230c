# SPDX-License-Identifier: Apache-2.0
"""Training batches of the embedded language model: rows of documents or repeats, positions, hidden past entries."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch.nn import functional

from headkv_mm.demo.text_rows import VALUE_WEIGHT, document_row, repeats_row
from headkv_mm.demo.text_tokenizer import MAX_LENGTH

RECENT = 16  # tokens at a document's end that no head loses, as every compression method keeps them


@dataclass(frozen=True)
class TextBatch:
    """Rows of one length.

    Attributes:
        inputs: int64 [B, T].
        targets: int64 [B, T], what follows each token.
        weights: float32 [B, T] of the loss; `VALUE_WEIGHT` marks the values of answers.
        positions: int64 [1, T], rising, with or without jumps.
        asking: int64 [B], where the first question begins; T without questions.
        spare: bool [B, T], tokens of the document that no answer needs.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    asking: torch.Tensor
    spare: torch.Tensor


def positions_with_jumps(rng: random.Random, length: int, jumps: int) -> torch.Tensor:
    """Positions that skip some places, so that short rows teach long distances; int64 [1, length]."""
    steps = torch.ones(length, dtype=torch.long)
    steps[0] = 0
    free = MAX_LENGTH - length
    for _ in range(jumps):
        skip = rng.randint(0, max(0, free // jumps))
        steps[rng.randrange(1, length)] += skip
    return steps.cumsum(0)[None]


def text_batch(rng: random.Random, length: int, rows: int, mix: dict[str, float] | None, jumps: int = 0) -> TextBatch:
    """A batch of documents, or of repeats if `mix` is None."""
    drawn = [repeats_row(rng, length) if mix is None else document_row(rng, length, mix) for _ in range(rows)]
    return TextBatch(
        torch.tensor([row.inputs for row in drawn]),
        torch.tensor([row.targets for row in drawn]),
        torch.tensor([row.weights for row in drawn]),
        positions_with_jumps(rng, length, jumps),
        torch.tensor([row.asking for row in drawn]),
        torch.tensor([row.spare for row in drawn]),
    )


def forgetful_mask(batch: TextBatch, heads: int, kv_heads: int, generator: torch.Generator) -> torch.Tensor:
    """A causal mask in which KV heads have lost part of the document for the tokens of questions and answers.

    Every KV head of every row loses a random share of what no answer needs; half of the heads lose tokens anywhere, the
    other half the oldest ones. A quarter of the rows lose nothing. Tokens of the document itself still see all before
    them, as in a prefill that is compressed afterwards.

    Returns:
        bool [B, heads, T, T], True where a query may look.
    """
    rows, length = batch.inputs.shape
    share = torch.rand(rows, kv_heads, 1, generator=generator)
    share[torch.rand(rows, generator=generator) < 0.25] = 0.0
    anywhere = torch.rand(rows, kv_heads, length, generator=generator)  # [B, G, T]
    place = torch.arange(length)
    age = place / batch.asking[:, None]  # [B, T], 0 at the beginning of the document, 1 at its end
    oldest = torch.rand(rows, kv_heads, 1, generator=generator) < 0.5
    lost = torch.where(oldest, age[:, None], anywhere) < share
    lost &= (batch.spare & (place < batch.asking[:, None] - RECENT))[:, None]
    asks = place >= batch.asking[:, None]  # [B, T], queries
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ~(asks[:, None, :, None] & lost[:, :, None, :])  # [B, G, T, T]
    return mask.repeat_interleave(heads // kv_heads, dim=1)


def batch_losses(
    model: torch.nn.Module, batch: TextBatch, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The weighted loss to train on and the mean loss on the values of answers, both in nats per token."""
    logits = model(batch.inputs, attention_mask=mask, position_ids=batch.positions, use_cache=False).logits
    each = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    values = each.detach()[weights == VALUE_WEIGHT]
    return (each * weights).sum() / weights.sum(), float(values.mean())
