# SPDX-License-Identifier: Apache-2.0
"""Several query tokens over a ragged store: chunked prefill and second turns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .ragged import RaggedKV

_AT_ONCE = 1 << 25
"""Mask entries (or logits) per piece of a chunk, over all rows and heads: bounds what a long chunk takes."""


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

    The regions are padded to the longest for the time of the call, and the chunk is taken in pieces. Rows that see
    nothing (padding) give zeros.

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
    piece = max(_AT_ONCE // max(batch * heads * keys.shape[2], 1), 1)
    outputs = []
    for begin in range(0, tokens, piece):
        asked, asking = grouped[:, :, :, begin : begin + piece], query_positions[:, begin : begin + piece]
        visible = (positions[:, :, None] >= 0) & (positions[:, :, None] <= asking[:, None, :, None])  # [B, G, T, M]
        if softcap > 0 or sinks is not None:
            outputs.append(_attend_in_full(asked, keys, values, visible, scale=scale, softcap=softcap, sinks=sinks))
        else:
            outputs.append(_attend(asked, keys, values, visible, scale=scale))
    output = torch.cat(outputs, 3)  # [B, G, R, T, D]
    return output.reshape(batch, heads, tokens, head_dim).transpose(1, 2).contiguous()


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Torch's attention, a KV head's group side by side: [B, G, R, T, D]."""
    group = query.shape[2]
    mask = visible.repeat(1, 1, group, 1)  # [B, G, R * T, M]
    output: Tensor = scaled_dot_product_attention(query.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
    # Where nothing is visible a backend may give NaN or the mean of everything.
    some = mask.any(-1, keepdim=True)
    shown = torch.where(some, output, 0.0).to(query.dtype)
    return shown.view(*query.shape)


def _attend_in_full(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """With what torch's attention does not know: a cap on the logits, and a learned logit in the denominator."""
    batch, kv_heads, _, tokens, _ = query.shape
    logits = torch.einsum("bgrtd,bgmd->bgrtm", query.float(), keys.float()) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, -1, 1, 1).expand(batch, -1, -1, tokens, 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return torch.einsum("bgrtm,bgmd->bgrtd", weights, values.float()).to(query.dtype)
