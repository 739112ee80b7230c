# SPDX-License-Identifier: Apache-2.0
"""What the comparisons of allocation forms share."""

from __future__ import annotations

from headkv_mm.allocators import Proportional
from headkv_mm.selectors import Stratified

BY_SCORE = Stratified(strata_ratio=0.0)
TEXT_WINDOW = 8
CHOSEN = "pointed"
"""The rule that the exploration chose, for images and for texts."""


def pointed(*, contrast: float) -> Proportional:
    """Budgets of a text by how pointedly single queries look far back."""
    return Proportional(
        window=TEXT_WINDOW, scope="model", statistic="pointed", most=16.0, grouping_queries=64, contrast=contrast
    )
