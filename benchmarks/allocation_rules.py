# SPDX-License-Identifier: Apache-2.0
"""Rules that the comparisons of allocation forms share, and how they become methods of a process."""

from __future__ import annotations

from headkv_mm.allocators import Proportional, Uniform
from headkv_mm.registry import Pieces, methods, register_method
from headkv_mm.schedules import AfterGrouping, EachInterval
from headkv_mm.scorers import KeyDifference, LogitSpread
from headkv_mm.selectors import Stratified

BY_SCORE = Stratified(strata_ratio=0.0)
TEXT_WINDOW = 8
CHOSEN = {"images": "logit-spread", "text": "pointed"}
"""The rules that the exploration chose."""


def pointed(*, contrast: float = 4.0) -> Proportional:
    """Budgets of a text by how pointedly single queries look far back."""
    return Proportional(
        window=TEXT_WINDOW, scope="model", statistic="pointed", grouping_queries=64, most=16.0, contrast=contrast
    )


def register_chosen() -> None:
    """Make methods of the chosen rules where the library has none of that name."""
    chosen = {
        "logit-spread": {"image": Pieces(LogitSpread(), Uniform(), BY_SCORE, AfterGrouping())},
        "pointed": {"text": Pieces(KeyDifference(), pointed(), BY_SCORE, EachInterval())},
    }
    for name, pieces in chosen.items():
        if name not in methods():
            register_method(name, **pieces, description="chosen by the exploration")
