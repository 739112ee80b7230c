# SPDX-License-Identifier: Apache-2.0
"""LayerState: the content of a text's layer as named tensors and numbers, to save it and to make it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerState:
    """Everything that one layer holds.

    Attributes:
        tensors: by name.
        numbers: JSON types.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
