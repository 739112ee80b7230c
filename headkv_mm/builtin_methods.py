# SPDX-License-Identifier: Apache-2.0
"""The methods that come with the package. A table: what each is made of, and where it is from."""

from __future__ import annotations

from .allocators import HeadTableShares, HeadType, LayerTableShares, Pooled, Proportional, Pyramid, RiskGate, Uniform
from .registry import Pieces, register_method
from .schedules import AfterGrouping, EachInterval, EachRow, TokenSelective
from .scorers import (
    AccumulatedAttention,
    ExpectedAttention,
    KeyDifference,
    KeyNorm,
    LastQuery,
    LogitSpread,
    OutputNorm,
    Random,
    Recency,
    RecentQueries,
    Redundancy,
    RetrievalHeads,
    ValueWeighted,
    WindowAttention,
)
from .selectors import MassSegments, Stratified

_BY_SCORE = Stratified(strata_ratio=0.0)

register_method(
    "headkv",
    image=Pieces(RecentQueries(), HeadType(), Stratified(), AfterGrouping()),
    # The paper is about images. In a text what a later question asks for is not what the last queries attend to, so
    # entries are told apart by their keys.
    text=Pieces(KeyDifference(), HeadType(window=8), Stratified(), EachInterval()),
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
    text=Pieces(Recency(), Uniform(window=8), _BY_SCORE, EachInterval()),
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
register_method(
    "logit-spread",
    image=Pieces(LogitSpread(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(LogitSpread(), Uniform(), _BY_SCORE, EachInterval()),
    description="The same budget for every head; what the last queries ask for most differently, times value norms.",
    source="this library",
)
register_method(
    "pointed",
    image=Pieces(
        LogitSpread(),
        Proportional(statistic="pointed", scope="model", most=16.0),
        _BY_SCORE,
        AfterGrouping(),
    ),
    # A later question is not known, so as in headkv entries are told apart by their keys. Few heads look up single far
    # tokens of a text, and those need nearly everything: hence the contrast.
    text=Pieces(
        KeyDifference(),
        Proportional(statistic="pointed", scope="model", most=16.0, window=8, grouping_queries=64, contrast=8.0),
        _BY_SCORE,
        EachInterval(),
    ),
    description="All heads of the model divide one budget: more for heads whose single queries point at far entries.",
    source="this library",
)
register_method(
    "adakv",
    image=Pieces(WindowAttention(pool=1), Pooled(), _BY_SCORE, AfterGrouping()),
    text=Pieces(WindowAttention(), Pooled(), _BY_SCORE, EachInterval()),
    description="Heads of a layer compete for its budget by what the last queries attend to.",
    source="arXiv 2407.11550",
)
register_method(
    "fastkv",
    text=Pieces(WindowAttention(window=8), Uniform(window=8), _BY_SCORE, TokenSelective()),
    description="As snapkv, and after half of the layers only tokens that the last queries attend to go on.",
    source="arXiv 2502.01068",
)
register_method(
    "pyramidkv",
    text=Pieces(WindowAttention(), Pyramid(), _BY_SCORE, EachInterval()),
    description="Budgets that fall from the first layer to the last; what the last queries attend to.",
    source="arXiv 2406.02069",
)
register_method(
    "headkv-r2",
    text=Pieces(WindowAttention(window=8), HeadTableShares(), _BY_SCORE, EachInterval()),
    description="Budgets by a table of head scores measured once per model; what the last queries attend to.",
    source="arXiv 2410.19258",
)
register_method(
    "knorm",
    image=Pieces(KeyNorm(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(KeyNorm(), Uniform(window=8), _BY_SCORE, EachInterval()),
    description="The same budget for every head; keys of a small norm, and the newest.",
    source="arXiv 2406.11430",
)
register_method(
    "keydiff",
    image=Pieces(KeyDifference(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(KeyDifference(), Uniform(window=8), _BY_SCORE, EachInterval()),
    description="The same budget for every head; keys that differ from the others, and the newest.",
    source="arXiv 2504.15364",
)
register_method(
    "expected-attention",
    image=Pieces(ExpectedAttention(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(ExpectedAttention(), Uniform(window=8), _BY_SCORE, EachInterval()),
    description="The same budget for every head; attention expected from queries like the last, times value norms.",
    source="arXiv 2510.00636",
)
register_method(
    "r-kv",
    image=Pieces(Redundancy(), Uniform(window=8), _BY_SCORE, EachRow()),
    text=Pieces(Redundancy(), Uniform(window=8), _BY_SCORE, EachInterval()),
    description="The same budget for every head; what the last queries attend to and no newer entry repeats.",
    source="arXiv 2505.24133",
)
register_method(
    "compresskv",
    text=Pieces(RetrievalHeads(), LayerTableShares(), _BY_SCORE, EachInterval()),
    description="The same entries in all heads of a layer, by its retrieval heads; budgets by a table of layer errors.",
    source="arXiv 2508.02401",
)
register_method(
    "laprox",
    image=Pieces(OutputNorm(pool=1), Pooled(alpha=0.0), _BY_SCORE, AfterGrouping()),
    text=Pieces(OutputNorm(), Pooled(alpha=0.0, scope="model"), _BY_SCORE, EachInterval()),
    description="All heads of the model compete by what an entry adds to the layers' outputs for the last queries.",
    source="arXiv 2605.07234",
)
register_method(
    "ams",
    image=Pieces(ExpectedAttention(), Uniform(), MassSegments(), EachRow()),
    # Any scorer goes with the selector. Of those tried on documents of their own this one kept most of what was needed.
    text=Pieces(KeyDifference(), Uniform(window=8), MassSegments(), EachInterval()),
    description="Every stretch of the text keeps a quota by its attention, and in it the best by any scorer.",
    source="arXiv 2605.23200",
)
register_method(
    "compilerkv",
    text=Pieces(ValueWeighted(), RiskGate(), _BY_SCORE, EachInterval()),
    description="Experimental: one set of entries per layer, by tables compiled for the model; it may keep fewer.",
    source="arXiv 2602.08686",
)
register_method(
    "random",
    image=Pieces(Random(), Uniform(), _BY_SCORE, EachRow()),
    text=Pieces(Random(), Uniform(window=8), _BY_SCORE, EachInterval()),
    description="The same budget for every head; entries by chance, and the newest: what a method must beat.",
)
