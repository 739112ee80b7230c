# SPDX-License-Identifier: Apache-2.0
"""Allocators: how many entries each head keeps."""

from .head_table import HeadTableShares
from .head_type import HeadType
from .layer_table import LayerTableShares
from .mass_curves import MassCurves
from .pooled import Pooled
from .proportional import Proportional
from .pyramid import Pyramid
from .risk_gate import RiskGate
from .uniform import Uniform

__all__ = [
    "HeadTableShares",
    "HeadType",
    "LayerTableShares",
    "MassCurves",
    "Pooled",
    "Proportional",
    "Pyramid",
    "RiskGate",
    "Uniform",
]
