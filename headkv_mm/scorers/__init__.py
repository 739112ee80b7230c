# SPDX-License-Identifier: Apache-2.0
"""Scorers: which entries matter."""

from .attention import AccumulatedAttention, LastQuery, WindowAttention
from .chance import Random
from .expected import ExpectedAttention
from .keys import KeyDifference, KeyNorm
from .logit_spread import LogitSpread
from .output_norm import OutputNorm
from .recent import Recency, RecentQueries
from .redundancy import Redundancy
from .retrieval import RetrievalHeads
from .value_weighted import ValueWeighted

__all__ = [
    "AccumulatedAttention",
    "ExpectedAttention",
    "KeyDifference",
    "KeyNorm",
    "LastQuery",
    "LogitSpread",
    "OutputNorm",
    "Random",
    "Recency",
    "RecentQueries",
    "Redundancy",
    "RetrievalHeads",
    "ValueWeighted",
    "WindowAttention",
]
