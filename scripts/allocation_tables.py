# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/head_types.md that compare allocation forms by what comes out; `update_docs.py` puts them in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_files import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from allocation_held_out_table import by_budget, described, interval, label, quality, verdicts

from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import percent, table

EXPLORATION = "allocation_exploration/results.json"
HELD_OUT = "allocation_held_out/results.json"
HELD_OUT_DEEP = "allocation_held_out_deep/results.json"


def forms_of_images() -> str:
    """What every form gets right on the captions of the exploration, by budget."""
    return _forms("images")


def forms_of_texts() -> str:
    """The same on its documents."""
    return _forms("text")


def held_out_images() -> str:
    """The chosen rule against the others on captions of other seeds."""
    return _held_out("images")


def held_out_texts() -> str:
    """The same on documents."""
    return _held_out("text")


def held_out_deep() -> str:
    """The chosen rule against others on an image model twice as deep."""
    return quality(load(HELD_OUT_DEEP)["images"])


def _forms(kind: str) -> str:
    part = load(EXPLORATION)[kind]
    runs = part["runs"]
    budgets = sorted({run["budget"] for run in runs if run["budget"] is not None}, reverse=True)
    found = {(run["method"], run["budget"]): run for run in runs}
    full = next(run for run in runs if run["method"] == FULL)
    rows = [["full cache", "", *([percent(full["right"]["mean"])] * len(budgets))]]
    for method in dict.fromkeys(run["method"] for run in runs if run["method"] != FULL):
        one = next(run for run in runs if run["method"] == method)
        cells = [_cell(found.get((method, budget)), kind) for budget in budgets]
        rows.append([one.get("entries", method), one.get("division", ""), *cells])
    widest = max(
        max(run["right"]["high"] - run["right"]["mean"], run["right"]["mean"] - run["right"]["low"]) for run in runs
    )
    unit = "captions" if kind == "images" else "documents"
    second = " In parentheses: KL to the full cache, 1/1000 nats per token." if kind == "images" else ""
    note = (
        f"{full['right'][unit]} {unit}, seed {part['settings']['seed']}; 95 % intervals reach at most "
        f"{100 * widest:.1f} points to a side.{second}"
    )
    heads = ["entries kept for", "division", *(f"right, {budget_label(budget)}" for budget in budgets)]
    return f"{table(heads, rows)}\n\n{note}"


def _cell(run: Mapping[str, Any] | None, kind: str) -> str:
    if run is None:
        return ""
    right = percent(run["right"]["mean"])
    return f"{right} ({1000 * run['kl']['mean']:.2f})" if kind == "images" and run["kl"] else right


def _held_out(kind: str) -> str:
    part = load(HELD_OUT)[kind]
    return "\n\n".join((described(part), quality(part), "Intervals that do not overlap:", verdicts(part)))


def held_out_images_short() -> str:
    """What every method gets right on the held-out captions, a column per budget."""
    return _held_out_short("images")


def held_out_texts_short() -> str:
    """The same on documents."""
    return _held_out_short("text")


def _held_out_short(kind: str) -> str:
    part = load(HELD_OUT)[kind]
    runs = by_budget(part["runs"])
    budgets = sorted({run["budget"] for run in runs if run["budget"] is not None}, reverse=True)
    found = {(label(run), run["budget"]): run for run in runs}
    full = next(run for run in runs if run["method"] == FULL)
    rows = [["full cache", interval(full["right"], "right"), *([""] * (len(budgets) - 1))]]
    for name in dict.fromkeys(label(run) for run in runs if run["method"] != FULL):
        rows.append([f"`{name}`", *(interval(found[name, budget]["right"], "right") for budget in budgets)])
    seeds = ", ".join(map(str, part["settings"]["seeds"]))
    heads = [f"{part['items']} {part['unit']}, seeds {seeds}", *(budget_label(budget) for budget in budgets)]
    return table(heads, rows)
