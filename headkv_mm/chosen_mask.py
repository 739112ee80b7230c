# SPDX-License-Identifier: Apache-2.0
"""The attention mask of layers that see only the tokens that were chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from .propagation import Selection


def chosen_mask(selection: Selection, before: Tensor | None, stock: Tensor | None) -> Tensor | None:
    """The mask of the layers after, in the form that the stock mask has.

    Args:
        selection: what goes on.
        before: [B, P] bool, which columns of the cache before the forward are no padding; None if there are none.
        stock: the stock mask: None, [B, K] (flash attention), or [B, 1, T, K], bool or additive.

    Raises:
        ValueError: for a mask of any other kind.
    """
    if stock is None and (before is None or bool(before.all())) and not selection.padded:
        return None
    visible = selection.passed.visible  # [B, S]
    keys = visible if before is None else torch.cat([before.to(visible.device), visible], 1)  # [B, P + S]
    if stock is None or (isinstance(stock, Tensor) and stock.dim() == 2):
        return keys.to(torch.bool if stock is None else stock.dtype)
    if not isinstance(stock, Tensor) or stock.dim() != 4:
        raise ValueError(
            f"a mask of type {type(stock).__name__} cannot be cut down to chosen tokens; use sdpa or eager attention"
        )
    width, columns = visible.shape[1], keys.shape[1]
    causal = torch.ones(width, columns, dtype=torch.bool, device=visible.device).tril(columns - width)
    own = torch.zeros_like(causal).diagonal_scatter(torch.ones(width).bool().to(visible.device), columns - width)
    # Padding sees itself and nothing else sees it: a row that sees nothing may become NaN.
    allowed = (causal & keys[:, None] | own)[:, None]  # [B, 1, S, P + S]
    if stock.dtype == torch.bool:
        return allowed
    lowest = torch.finfo(stock.dtype).min
    return torch.zeros_like(allowed, dtype=stock.dtype).masked_fill(~allowed, lowest)
