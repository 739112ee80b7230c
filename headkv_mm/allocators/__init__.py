# SPDX-License-Identifier: Apache-2.0
"""Allocators: how many entries each head keeps."""

from .head_table import HeadTableShares
from .head_type import HeadType
from .pooled import Pooled
from .pyramid import Pyramid
from .uniform import Uniform

__all__ = ["HeadTableShares", "HeadType", "Pooled", "Pyramid", "Uniform"]
