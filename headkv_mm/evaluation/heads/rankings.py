# SPDX-License-Identifier: Apache-2.0
"""Orders in which a head may keep its entries, from what is known before a choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from headkv_mm.evaluation.heads.attending import RecordedRow

LAST_ROW = "attention of the last row"


def scores_before(
    layer: RecordedRow, stretches: Sequence[tuple[int, int]], row: int, sizes: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Scores of the entries before every stretch; the highest stay.

    Args:
        layer: what was recorded.
        stretches: see `needs.future_gains`.
        row: queries of a row or window.
        sizes: [G, R, T] norms of the projected values.

    Yields:
        For each stretch by name [G, n], of the entries from `layer.first` on.
    """
    first, done = layer.first, layer.first
    added = layer.keys.new_zeros(layer.keys.shape[0], stretches[-1][0])
    for begin, _ in stretches:
        added[:, :begin] += layer.mass(done, begin) * (begin - done)
        done = begin
        single = layer.attention(begin - row, begin)[..., first:]  # [G, R, row, n]
        attention = single.mean(2)  # [G, R, n]
        logits = layer.logits(begin - row, begin)[..., first:]  # [G, R, row, n]
        # Logits of all of the row, also of those queries that came before the entry.
        asking = layer.query[:, :, begin - row : begin]  # [G, R, row, D]
        mean = asking.mean((1, 2))[..., None]  # [G, D, 1]
        asked = asking @ layer.keys[:, None, first:begin].mT * layer.scale  # [G, R, row, n]
        unit = normalize(layer.keys[:, first:begin], dim=-1)  # [G, n, D]
        anchor = normalize(unit.double().sum(1, keepdim=True), dim=-1).float()
        yield {
            LAST_ROW: attention.mean(1),
            "attention of the last two rows": layer.mass(begin - 2 * row, begin)[:, first:],
            "all attention so far": added[:, first:begin].clone(),
            "attention of the last row times size of the projected value": (attention * sizes[..., first:begin]).mean(
                1
            ),
            "mean logit of the last row": (layer.keys[:, first:begin] @ mean)[..., 0],
            "largest logit of the last row": logits.amax((1, 2)),
            "spread of the last row's logits": asked.std(2, correction=0).mean(1),
            "largest attention of a query of the last row": single.amax((1, 2)),
            "keys unlike the others": -(unit * anchor).sum(-1),
            "newest": torch.arange(begin - first, device=unit.device, dtype=unit.dtype).expand(unit.shape[:2]),
        }


def value_sizes(layer: RecordedRow, gram: Tensor) -> Tensor:
    """Norms of the projected values, [G, R, T].

    Args:
        layer: what was recorded.
        gram: [G, R, D, D], the Gram matrices of the output projections, see `headkv_mm.output_projections`.
    """
    values = layer.values[:, None]  # [G, 1, T, D]
    return ((values @ gram) * values).sum(-1).clamp(min=0).sqrt()
