# SPDX-License-Identifier: Apache-2.0
"""Several query tokens over a ragged store: chunked prefill and second turns."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import RaggedKV


def visible_columns(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the newest `tokens` columns the newest query may see; the others are padding.

    Args:
        mask: [B, 1, Q, K] bool or additive float, [B, K] (flash attention), or None for no padding.
        tokens: how many columns at the end are new.

    Returns:
        [B, tokens] bool, or None.
    """
    if mask is None:
        return None
    row = mask[:, -tokens:] if mask.dim() == 2 else mask[:, 0, -1, -tokens:]
    if row.is_floating_point():
        return row > torch.finfo(row.dtype).min / 2
    return row.bool()


def attend_chunk(
    query: Tensor,
    query_positions: Tensor,
    store: RaggedKV,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of T query tokens per row over the store, which holds the chunk already.

    The regions are padded to the longest for the time of the call. Rows that see nothing (padding) give zeros.

    Args:
        query: [B, H, T, D].
        query_positions: [B, T], position of each query in its row.
        store: the layer's storage.
        scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.

    Returns:
        [B, T, H, D] in the query's dtype.
    """
    batch, heads, tokens, head_dim = query.shape
    keys, values, positions = store.padded()  # [B, G, M, D], [B, G, M]
    grouped = query.view(batch, store.kv_heads, -1, tokens, head_dim)  # [B, G, R, T, D]
    logits = torch.einsum("bgrtd,bgmd->bgrtm", grouped.float(), keys.float()) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    visible = (positions[:, :, None] >= 0) & (
        positions[:, :, None] <= query_positions[:, None, :, None]
    )  # [B, G, T, M]
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, store.kv_heads, -1, 1, 1).expand(batch, -1, -1, tokens, 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
    output = torch.einsum("bgrtm,bgmd->bgrtd", weights, values.float()).to(query.dtype)
    return output.reshape(batch, heads, tokens, head_dim).transpose(1, 2).contiguous()
