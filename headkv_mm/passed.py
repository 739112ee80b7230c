# SPDX-License-Identifier: Apache-2.0
"""Passed: the tokens that reach a layer where not all of a forward do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Passed:
    """Tokens that reach a layer, where not all of a forward do.

    Attributes:
        positions: [B, S] int32, counted from the first real token of each row; -1 for padding.
        row_seen: real tokens of each row so far, those that went no further included; on the host.
    """

    positions: Tensor
    row_seen: list[int]

    @property
    def visible(self) -> Tensor:
        """[B, S] bool, False for padding."""
        return self.positions >= 0
