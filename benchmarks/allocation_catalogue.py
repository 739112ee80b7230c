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
    plain: Chooser = (RecentQueries(), BY_SCORE)
    attention: Chooser = (WindowAttention(pool=1), BY_SCORE)  # as in snapkv and adakv
    spread: Chooser = (LogitSpread(), BY_SCORE)
    spread_alone: Chooser = (LogitSpread(by_value=False), BY_SCORE)
    curves = MassCurves(scope="model")
    pointed_rows = Proportional(scope="model", statistic="pointed", contrast=4.0, most=16.0)
    divisions: list[tuple[str, str, Allocator]] = [
        ("curves-model", "curves", curves),
        ("pointed-contrast-4-model", "pointed, contrast 4", pointed_rows),
    ]
    if needs is not None:
        scores = tuple(tuple(layer) for layer in needs)
        divisions.append(("needs", "table of needs", HeadTableShares(beta=NEEDS_BETA, scores=scores)))
    pooled = Pooled(scope="model")
    once, again = AfterGrouping(), AfterGrouping(regroup_rows=REFRESH_ROWS)
    return [
        Form("logits", "two groups", "headkv"),
        made("logits+two-groups-again", "logits", "two groups, refreshed", (logits, HeadType(), again)),
        made("logits+all-global", "logits", "equal", (logits, Uniform(window_rows=2.0), once)),
        *(made(f"logits+{method}", "logits", name, (logits, form, once)) for method, name, form in divisions),
        Form("attention", "equal", "snapkv"),
        Form("attention", "pooled in layers", "adakv"),
        made("attention+pooled-model", "attention", "pooled", (attention, pooled, once)),
        *(made(f"attention+{method}", "attention", name, (attention, form, once)) for method, name, form in divisions),
        made("attention+curves-model-again", "attention", "curves, refreshed", (attention, curves, again)),
        made("spread-no-value+equal", "logit spread, no values", "equal", (spread_alone, Uniform(), once)),
        Form("logit spread", "equal", "logit-spread"),
        Form("logit spread", "pointed, contrast 1", "pointed"),
        made("spread+pooled-model", "logit spread", "pooled", (spread, pooled, once)),
        *(made(f"spread+{method}", "logit spread", name, (spread, form, once)) for method, name, form in divisions),
        made("logits-no-strata+two-groups", "logits, no strata", "two groups", (plain, HeadType(), once)),
        made("keys+two-groups", "keys", "two groups", ((KeyDifference(), BY_SCORE), HeadType(), once)),
        made("redundancy+two-groups", "attention and keys", "two groups", ((Redundancy(), BY_SCORE), HeadType(), once)),
        Form("keys", "equal", "keydiff"),
        Form("attention and keys", "equal", "r-kv"),
        Form("attention, first row", "equal", "lines"),
        Form("newest", "equal", "streaming"),
    ]


def text_forms() -> list[Form]:
    """Forms for texts."""
    keys: Chooser = (KeyDifference(), BY_SCORE)
    by_value: Chooser = (KeyDifference(by_value=True), BY_SCORE)
    attention: Chooser = (WindowAttention(window=TEXT_WINDOW), BY_SCORE)
    by_statistic = Proportional(window=TEXT_WINDOW, scope="model")
    curves = MassCurves(window=TEXT_WINDOW, scope="model")
    pooled = Pooled(window=TEXT_WINDOW, scope="model")
    groups = HeadType(window=TEXT_WINDOW)
    divisions: dict[str, tuple[str, Allocator]] = {
        "pooled-scores-layer": ("pooled in layers", replace(pooled, scope="layer")),
        "pooled-scores-model": ("pooled", pooled),
        "curves-layer": ("curves in layers", replace(curves, scope="layer")),
        "curves-model": ("curves", curves),
        "entropy-model": ("entropy", by_statistic),
        "curve-length-model": ("best entries", replace(by_statistic, statistic="curve")),
        "backward-model": ("backward tokens", replace(by_statistic, statistic="backward")),
        "distant-model": ("distant", replace(by_statistic, statistic="distant")),
        "pointed-of-64-up-to-16-model": ("pointed, contrast 1", pointed(contrast=1.0)),
        "pointed-of-64-contrast-4-up-to-16-model": ("pointed, contrast 4", pointed(contrast=4.0)),
        "pointed-of-64-contrast-8-up-to-16-model": ("pointed, contrast 8", pointed(contrast=8.0)),  # `pointed`
        "key-spread-model": ("spread of keys", replace(by_statistic, statistic="keys")),
        "table": ("head table", HeadTableShares(window=TEXT_WINDOW)),
    }
    by_attention = ("pooled-scores-model", "curves-model", "pointed-of-64-contrast-4-up-to-16-model")
    each = EachInterval()
    return [
        Form("keys", "equal", "keydiff"),
        Form("keys", "two groups", "headkv"),
        *(made(f"keys+{method}", "keys", name, (keys, form, each)) for method, (name, form) in divisions.items()),
        made("keys-by-value+equal", "keys by value", "equal", (by_value, Uniform(window=TEXT_WINDOW), each)),
        made("keys-by-value+table", "keys by value", "head table", (by_value, divisions["table"][1], each)),
        made(
            "keys-by-value+pointed-contrast-8",
            "keys by value",
            "pointed, contrast 8",
            (by_value, pointed(contrast=8.0), each),
        ),
        Form("attention", "equal", "snapkv"),
        Form("attention", "pooled in layers", "adakv"),
        *(
            made(f"attention+{method}", "attention", divisions[method][0], (attention, divisions[method][1], each))
            for method in by_attention
        ),
        Form("attention", "head table", "headkv-r2"),
        made("keys-no-strata+two-groups", "keys, no strata", "two groups", (keys, groups, each)),
        made("redundancy+two-groups", "attention and keys", "two groups", ((Redundancy(), BY_SCORE), groups, each)),
        Form("attention and keys", "equal", "r-kv"),
        Form("logit spread", "equal", "logit-spread"),
        Form("newest", "equal", "streaming"),
        Form("chance", "equal", "random"),
    ]


def made(method: str, entries: str, division: str, parts: tuple[Chooser, Allocator, Schedule]) -> Form:
    """A form that the library has no name for."""
    (scorer, selector), allocator, schedule = parts
    return Form(entries, division, method, Pieces(scorer, allocator, selector, schedule))


def register_forms(images: Sequence[Form], text: Sequence[Form]) -> None:
    """Make methods of the forms that are none yet; one name may stand for a form for images and one for texts."""
    pieces: list[dict[str, Pieces]] = [
        {form.method: form.pieces for form in forms if form.pieces is not None} for forms in (images, text)
    ]
    for method in dict.fromkeys((*pieces[0], *pieces[1])):
        register_method(method, image=pieces[0].get(method), text=pieces[1].get(method), description="a form")
