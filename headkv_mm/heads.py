# SPDX-License-Identifier: Apache-2.0
"""The detector: which heads look only at what is near."""

from __future__ import annotations

from torch import Tensor

from . import kernels
from .pieces import Observed


def is_local(
    observed: Observed, *, queries: int, window: Tensor, tau: float, include_condition: bool = False
) -> Tensor:
    """Local heads: those that find a share `tau` of their attention in fewer than `window` of the newest tokens.

    Attention is averaged over the observed queries and over the group of a KV head, so there is one label per KV head
    (arXiv 2605.20600, head grouping; the paper takes one query).

    Args:
        observed: with `queries` [B, Q, H, D].
        queries: how many of the last ones are averaged.
        window: [B, 1] int, tokens of the local window.
        tau: share of the mass.
        include_condition: count the condition tokens too. They are kept anyway, so by default they are left out.

    Returns:
        [B, G] bool.
    """
    store = observed.store
    newest, positions = observed.last_queries(queries)
    needed = kernels.head_mass(
        newest,
        positions,
        store.keys,
        store.positions,
        store.start,
        store.length,
        scale=observed.scale,
        tau=tau,
        first_position=None if include_condition else observed.condition,
    )
    return needed < window
