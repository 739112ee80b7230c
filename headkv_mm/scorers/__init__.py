# SPDX-License-Identifier: Apache-2.0
"""Scorers: which entries matter."""

from .attention import AccumulatedAttention, LastQuery, WindowAttention
from .recent import Recency, RecentQueries

__all__ = ["AccumulatedAttention", "LastQuery", "Recency", "RecentQueries", "WindowAttention"]
