# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/head_types.md; `update_docs.py` puts them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from result_files import load

from headkv_mm.evaluation.heads.tables import number, rankings
from headkv_mm.evaluation.tables import interval, percent, table

SHOWN = (
    "backward tokens, tau 0.9, 1 query",
    "backward tokens, tau 0.9, 1 row",
    "backward tokens, tau 0.9, 1 row, condition held",
    "mean distance",
    "attention beyond the last row",
    "attention outside the condition",
    "attention outside the first 4 entries",
    "attention times size of the projected value",
    "entropy (as effective entries)",
    "best entries, tau 0.9, 1 row",
    "pointed attention",
    "pointed attention, contrast 4",
    "pointed attention, contrast 8",
    "attention of the last row, pooled",
    "the same times projected value, pooled",
    "shipped head table, r2",
    "shipped head table, srh",
    "the item before, needs",
    "calibrated table of needs",
    "calibrated table of curves",
    "oracle needs",
    "oracle curves",
    "oracle budgets, shuffled among the heads",
    "uniform",
)
BUDGETS = ("1/8", "1/16")
FORMS = {
    "uniform": "",
    "attention of the last row, pooled": "curves-model",
    "entropy (as effective entries)": "entropy-model",
    "best entries, tau 0.9, 1 row": "curve-length-model",
    "backward tokens, tau 0.9, 1 row": "backward-model",
    "attention beyond the last row": "distant-model",
    "pointed attention": "pointed-of-64-up-to-16-model",
    "pointed attention, contrast 4": "pointed-of-64-contrast-4-up-to-16-model",
    "pointed attention, contrast 8": "pointed-of-64-contrast-8-up-to-16-model",
    "shipped head table, r2": "table",
}
"""Predictors whose division has answered questions, and its name in `benchmarks/allocation_forms.py`."""


def predictors_of_images() -> str:
    """Rank correlation, regret and gain of chosen predictors on images."""
    return _predictors(load("heads_images/results.json"))


def predictors_of_texts() -> str:
    """The same on texts."""
    return _predictors(load("heads_text/results.json"))


def rankings_of_images() -> str:
    """What every ranking loses on images."""
    return rankings(load("heads_images/results.json"))


def rankings_of_texts() -> str:
    """The same on texts."""
    return rankings(load("heads_text/results.json"))


def mass_and_answers() -> str:
    """What divisions of texts retain of the attention, and how many documents they answer right, at 1/8."""
    found = {one["name"]: one for one in load("heads_text/results.json")["predictors"]}
    runs = load("allocation_exploration/results.json")["text"]["runs"]
    right = {run["method"]: run["right"] for run in runs if run["budget"] == 1 / 8}
    rows = []
    for name, form in FORMS.items():
        one = found[name]
        at = one["budgets"]["1/8"]["model"]
        rows.append(
            [
                name,
                one["form"],
                number(one["spearman"]["model"]),
                number(at["regret"], 100),
                number(at["ranked_over_uniform"], 100, sign=True),
                interval(right[f"keys+{form}" if form else "keydiff"]),
            ]
        )
    return table(["predictor", "division", "Spearman", "regret 1/8", "gain 1/8", "documents right 1/8"], rows)


def needs() -> str:
    """How much heads differ in their needs, and how much of it stays from item to item."""
    rows = []
    for folder in ("heads_images", "heads_text"):
        content = load(f"{folder}/results.json")
        found, settings = content["needs"], content["settings"]
        late = [need for layer in found["late"] for need in layer]
        rows.append(
            [
                f"{settings['material']}, {settings['items']} {content['unit']}",
                f"{len(late)}",
                f"{min(late):.1f} to {max(late):.1f}",
                f"{sum(late) / len(late):.1f} of {found['late_entries']:.0f}",
                percent(found["explained_by_head"], 0),
            ]
        )
    return table(["", "KV heads", "mean need of a head", "of all heads", "variance that the head explains"], rows)


def _predictors(content: Mapping[str, Any]) -> str:
    by_name = {one["name"]: one for one in content["predictors"]}
    rows = []
    for name in (name for name in SHOWN if name in by_name):
        one = by_name[name]
        found = [one["budgets"][budget]["model"] for budget in BUDGETS]
        rows.append(
            [
                name,
                one["form"],
                number(one["spearman"]["model"]),
                number(one["spearman"]["layer"]),
                *(number(each["regret"], 100) for each in found),
                *(number(each["ranked_over_uniform"], 100, sign=True) for each in found),
            ]
        )
    heads = ["predictor", "division", "Spearman", "inside layers"]
    return table([*heads, *(f"regret {budget}" for budget in BUDGETS), *(f"gain {budget}" for budget in BUDGETS)], rows)
