# SPDX-License-Identifier: Apache-2.0
"""The forms that the exploration compares: what entries are kept for, and how heads divide the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from allocation_rules import BY_SCORE, TEXT_WINDOW, pointed

from headkv_mm.allocators import HeadTableShares, HeadType, MassCurves, Pooled, Proportional, Uniform
from headkv_mm.pieces import Allocator, Schedule, Scorer, Selector
from headkv_mm.registry import Pieces, register_method
from headkv_mm.schedules import AfterGrouping, EachInterval
from headkv_mm.scorers import KeyDifference, LogitSpread, RecentQueries, Redundancy, WindowAttention
from headkv_mm.selectors import Stratified

NEEDS_BETA = 4 / 3
"""With a table of needs every head keeps a quarter of an equal budget in any case."""
REFRESH_ROWS = 4

Table = Sequence[Sequence[float]]
Chooser = tuple[Scorer, Selector]


@dataclass(frozen=True)
class Form:
    """One way to choose entries and to divide a budget.

    Attributes:
        entries: what an entry is kept for.
        division: how the budget is divided among the heads.
        method: the name under which it runs.
        pieces: None for a method of the library.
    """

    entries: str
    division: str
    method: str
    pieces: Pieces | None = None


def image_forms(needs: Table | None) -> list[Form]:
    """Forms for images.

    Args:
        needs: entries that every head needs, by layer and KV head; None leaves out the forms that divide by them.
    """
    logits: Chooser = (RecentQueries(), Stratified())  # as in headkv
    attention: Chooser = (WindowAttention(pool=1), BY_SCORE)  # as in snapkv and adakv
    spread: Chooser = (LogitSpread(), BY_SCORE)
    curves = MassCurves(scope="model")
    divisions: dict[str, Allocator] = {
        "curves": curves,
        "pointed": Proportional(scope="model", statistic="pointed", contrast=4.0, most=16.0),
    }
    if needs is not None:
        divisions["needs"] = HeadTableShares(beta=NEEDS_BETA, scores=tuple(tuple(layer) for layer in needs))
    pooled = Pooled(scope="model")
    once, again = AfterGrouping(), AfterGrouping(regroup_rows=REFRESH_ROWS)
    return [
        Form("logits", "two groups", "headkv"),
        made("logits", "two groups, refreshed", (logits, HeadType(), again)),
        made("logits", "equal", (logits, Uniform(window_rows=2.0), once)),
        *(made("logits", name, (logits, division, once)) for name, division in divisions.items()),
        Form("attention", "equal", "snapkv"),
        Form("attention", "pooled in layers", "adakv"),
        made("attention", "pooled", (attention, pooled, once)),
        *(made("attention", name, (attention, division, once)) for name, division in divisions.items()),
        made("attention", "curves, refreshed", (attention, curves, again)),
        Form("logit spread", "equal", "logit-spread"),
        made("logit spread", "pooled", (spread, pooled, once)),
        *(made("logit spread", name, (spread, division, once)) for name, division in divisions.items()),
        made("logits, no strata", "two groups", ((RecentQueries(), BY_SCORE), HeadType(), once)),
        made("unlike keys", "two groups", ((KeyDifference(), BY_SCORE), HeadType(), once)),
        made("attention, unlike keys", "two groups", ((Redundancy(), BY_SCORE), HeadType(), once)),
        Form("unlike keys", "equal", "keydiff"),
        Form("attention, unlike keys", "equal", "r-kv"),
        Form("last row's attention, first row", "equal", "lines"),
        Form("newest", "equal", "streaming"),
    ]


def text_forms() -> list[Form]:
    """Forms for texts."""
    keys: Chooser = (KeyDifference(), BY_SCORE)
    attention: Chooser = (WindowAttention(window=TEXT_WINDOW), BY_SCORE)
    by_statistic = Proportional(window=TEXT_WINDOW, scope="model")
    curves = MassCurves(window=TEXT_WINDOW, scope="model")
    pooled = Pooled(window=TEXT_WINDOW, scope="model")
    table = HeadTableShares(window=TEXT_WINDOW)
    groups = HeadType(window=TEXT_WINDOW)
    divisions: dict[str, Allocator] = {
        "pooled in layers": replace(pooled, scope="layer"),
        "pooled": pooled,
        "curves in layers": replace(curves, scope="layer"),
        "curves": curves,
        "entropy": by_statistic,
        "backward": replace(by_statistic, statistic="backward"),
        "distant": replace(by_statistic, statistic="distant", grouping_queries=64),
        "pointed, contrast 1": pointed(contrast=1.0),
        "pointed, contrast 4": pointed(contrast=4.0),
        "pointed, contrast 8": pointed(contrast=8.0),
        "spread of keys": replace(by_statistic, statistic="keys"),
        "head table": table,
    }
    each = EachInterval()
    return [
        Form("unlike keys", "equal", "keydiff"),
        Form("unlike keys", "two groups", "headkv"),
        *(made("unlike keys", name, (keys, division, each)) for name, division in divisions.items()),
        made("attention", "equal", (attention, Uniform(window=TEXT_WINDOW), each)),
        made("attention", "pooled in layers", (attention, divisions["pooled in layers"], each)),
        made("attention", "curves", (attention, curves, each)),
        made("attention", "pointed, contrast 4", (attention, divisions["pointed, contrast 4"], each)),
        made("attention", "head table", (attention, table, each)),
        made("unlike keys, no strata", "two groups", (keys, groups, each)),
        made("attention, unlike keys", "two groups", ((Redundancy(), BY_SCORE), groups, each)),
        Form("attention, unlike keys", "equal", "r-kv"),
        Form("logit spread", "equal", "logit-spread"),
        Form("newest", "equal", "streaming"),
        Form("chance", "equal", "random"),
    ]


def made(entries: str, division: str, parts: tuple[Chooser, Allocator, Schedule]) -> Form:
    """A form that the library has no name for."""
    (scorer, selector), allocator, schedule = parts
    method = f"{entries}+{division}".replace(",", "").replace("'", "").replace(" ", "-")
    return Form(entries, division, method, Pieces(scorer, allocator, selector, schedule))


def register_forms(images: Sequence[Form], text: Sequence[Form]) -> None:
    """Make methods of the forms that are none yet; one name may stand for a form for images and one for texts."""
    pieces: list[dict[str, Pieces]] = [
        {form.method: form.pieces for form in forms if form.pieces is not None} for forms in (images, text)
    ]
    for method in dict.fromkeys((*pieces[0], *pieces[1])):
        register_method(method, image=pieces[0].get(method), text=pieces[1].get(method), description="a form")
