# SPDX-License-Identifier: Apache-2.0
"""Pooling of scores over neighbours in position order, wherever they lie in their region."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import RaggedKV


def pooled(scores: Tensor, store: RaggedKV, pool: int, pooling: str) -> Tensor:
    """Scores [N] pooled over `pool` neighbours among the entries that a region holds.

    At the borders only the neighbours that exist count. This is `kernels.window_scores`' pooling for regions that are
    not in position order, as evictions in place leave them.

    Args:
        scores: [N] float32.
        store: the layer's storage.
        pool: an odd number.
        pooling: "max" or "mean".
    """
    if pool == 1:
        return scores
    slots, filled = store.slots_in_order()  # [B, G, M]
    padding = float("-inf") if pooling == "max" else 0.0
    ordered = torch.where(filled, scores[slots].float(), padding)
    flat = ordered.flatten(0, 1)[:, None]  # [B * G, 1, M]
    if pooling == "max":
        result = torch.nn.functional.max_pool1d(flat, pool, stride=1, padding=pool // 2)
    else:
        ones = filled.flatten(0, 1)[:, None].float()
        box = torch.ones(1, 1, pool, device=scores.device)
        counted = torch.nn.functional.conv1d(ones, box, padding=pool // 2).clamp(min=1)
        result = torch.nn.functional.conv1d(flat, box, padding=pool // 2) / counted
    output = torch.zeros(scores.shape[0] + 1, dtype=torch.float32, device=scores.device)
    output[torch.where(filled, slots, scores.shape[0])] = result[:, 0].view_as(ordered)  # the last takes what is empty
    return output[:-1]
