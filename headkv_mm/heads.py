# SPDX-License-Identifier: Apache-2.0
"""The detector: which heads look only at what is near."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .pieces import Observed


def is_local(observed: Observed, *, window: int, tau: float, include_condition: bool = False) -> Tensor:
    """Local heads: those that find a share `tau` of their attention in fewer than `window` of the newest tokens.

    Attention is averaged over the observed queries and over the group of a KV head, so there is one label per KV head
    (arXiv 2605.20600, head grouping; the paper takes one query).

    Args:
        observed: with `queries` [B, Q, H, D].
        window: tokens of the local window.
        tau: share of the mass.
        include_condition: count the condition tokens too. They are kept anyway, so by default they are left out.

    Returns:
        [B, G] bool.
    """
    if observed.queries is None:
        raise RuntimeError("head grouping needs the last queries, and the layer kept none")
    store, count = observed.store, observed.queries.shape[1]
    ages = torch.arange(count, 0, -1, device=observed.seen.device, dtype=torch.int32)  # newest query has age 1
    needed = kernels.head_mass(
        observed.queries,
        observed.seen[:, None] - ages,
        store.keys,
        store.positions,
        store.start,
        store.length,
        scale=observed.scale,
        tau=tau,
        first_position=None if include_condition else observed.condition,
    )
    return needed < window
