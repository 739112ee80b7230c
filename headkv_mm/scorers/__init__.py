# SPDX-License-Identifier: Apache-2.0
"""Scorers: which entries matter."""

from .recent import Recency, RecentQueries

__all__ = ["Recency", "RecentQueries"]
