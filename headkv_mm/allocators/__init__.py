# SPDX-License-Identifier: Apache-2.0
"""Allocators: how many entries each head keeps."""

from .head_type import HeadType
from .uniform import Uniform

__all__ = ["HeadType", "Uniform"]
