# SPDX-License-Identifier: Apache-2.0
"""The methods that come with the package. A table: what each is made of, and where it is from."""

from __future__ import annotations

from .allocators import HeadType, Uniform
from .registry import Pieces, register_method
from .schedules import AfterGrouping, EachInterval, EachRow
from .scorers import AccumulatedAttention, LastQuery, Recency, RecentQueries, WindowAttention
from .selectors import Stratified

_BY_SCORE = Stratified(strata_ratio=0.0)

register_method(
    "headkv",
    image=Pieces(RecentQueries(), HeadType(), Stratified(), AfterGrouping()),
    text=Pieces(WindowAttention(), HeadType(), Stratified(), EachInterval()),
    description="Head types found online; local heads keep a window, global ones the rest; stratified eviction.",
    source="arXiv 2605.20600",
)
register_method(
    "lines",
    image=Pieces(RecentQueries(score="softmax"), Uniform(), Stratified(strata_ratio=0.0, anchor_rows=1.0), EachRow()),
    description="The same budget for every head; first and last rows stay, the rest by the last row's attention.",
    source="arXiv 2512.04857",
)
register_method(
    "streaming",
    image=Pieces(Recency(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(Recency(), Uniform(), _BY_SCORE, EachInterval()),
    description="The first tokens and the newest.",
    source="arXiv 2309.17453",
)
register_method(
    "snapkv",
    image=Pieces(WindowAttention(pool=1), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(WindowAttention(), Uniform(), _BY_SCORE, EachInterval()),
    description="The same budget for every head; what the last queries attend to, with its neighbours.",
    source="arXiv 2404.14469",
)
register_method(
    "h2o",
    image=Pieces(AccumulatedAttention(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(AccumulatedAttention(), Uniform(), _BY_SCORE, EachInterval()),
    description="The same budget for every head; what all queries so far have attended to, and the newest.",
    source="arXiv 2306.14048",
)
register_method(
    "tova",
    image=Pieces(LastQuery(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(LastQuery(), Uniform(window=1), Stratified(strata_ratio=0.0, sinks=0), EachInterval()),
    description="The same entries in every head: what the newest query attends to, averaged over the heads.",
    source="arXiv 2401.06104",
)
