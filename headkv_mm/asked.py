# SPDX-License-Identifier: Apache-2.0
"""Asked: the queries of a prompt or chunk, as a layer's decision looks at them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """The queries of a prompt or chunk, and how the layer asks.

    Attributes:
        queries: [B, T, H, D].
        positions: [B, T] int32, -1 for padding.
        scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.
    """

    queries: Tensor
    positions: Tensor
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None

    def last(self, count: int) -> Asked:
        """The last `count` queries, or all if there are fewer."""
        return replace(self, queries=self.queries[:, -count:], positions=self.positions[:, -count:])

    @property
    def mean(self) -> Tensor:
        """The mean of the queries that are no padding, [B, H, D] float32."""
        real = (self.positions >= 0)[..., None, None]
        return (self.queries.float() * real).sum(1) / real.sum(1).clamp(min=1)
