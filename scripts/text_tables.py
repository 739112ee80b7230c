# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents about the evaluation of texts; `update_docs.py` puts them in place."""

from __future__ import annotations

from result_files import load

from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import interval, percent, table
from headkv_mm.evaluation.text.tables import overview


def text() -> str:
    """Methods by budgets, the document compressed before its question is known."""
    return _text_overview("text/results.json")


def text_query_aware() -> str:
    """Methods by budgets, document and question compressed together."""
    return _text_overview("text_query_aware/results.json")


MIXED = {
    "text_mixed": "before, the documents above",
    "text_mixed_held_out": "before, other documents (seed 1)",
    "text_mixed_query_aware": "after, the documents below",
}


def text_mixed() -> str:
    """Budgets of one method with the scores of another."""
    rows = []
    for folder, when in MIXED.items():
        runs = load(f"{folder}/results.json")["runs"]
        full = percent(next(run for run in runs if run["method"] == FULL)["summary"]["exact"]["mean"])
        rows += [
            [
                f"`{run['method']}` with {', '.join(f'`{name}={value}`' for name, value in run['options'].items())}",
                when,
                budget_label(run["budget"]),
                interval(run["summary"]["exact"]),
                full,
            ]
            for run in runs
            if "scorer" in run["options"]
        ]
    return table(["method", "compressed before or after the question", "budget", "documents right", "full cache"], rows)


def text_short() -> str:
    """Chosen methods, the document compressed before and after its question is known."""
    chosen = (FULL, "headkv-r2", "keydiff", "headkv", "r-kv", "snapkv", "adakv", "streaming", "random")
    columns = [
        ("text", 1 / 2),
        ("text", 1 / 4),
        ("text", 1 / 8),
        ("text_query_aware", 1 / 4),
        ("text_query_aware", 1 / 8),
    ]
    found = {
        (name, run["method"], None if run["method"] == FULL else run["budget"]): run["summary"]["exact"]["mean"]
        for name in ("text", "text_query_aware")
        for run in load(f"{name}/results.json")["runs"]
    }
    rows = [
        [
            "full cache" if method == FULL else f"`{method}`",
            *(percent(found[name, method, None if method == FULL else budget], 0) for name, budget in columns),
        ]
        for method in chosen
    ]
    mixed = {
        (name, run["budget"]): percent(run["summary"]["exact"]["mean"], 0)
        for name, folder in (("text", "text_mixed"), ("text_query_aware", "text_mixed_query_aware"))
        for run in load(f"{folder}/results.json")["runs"]
        if run["method"] == "headkv-r2"
    }
    cells = [mixed.get(column, "") for column in columns]
    rows.insert(1, ["`headkv-r2` with `scorer=keydiff`", *cells])
    heads = [f"{'before' if name == 'text' else 'after'}, {budget_label(budget)}" for name, budget in columns]
    return table(["compressed before or after the question is known", *heads], rows)


def text_tasks() -> str:
    """Methods by tasks at a quarter of the entries."""
    content = load("text/results.json")
    tasks, budget = content["settings"]["tasks"], 1 / 4
    rows = [
        [
            "full cache" if run["method"] == FULL else f"`{run['method']}` {budget_label(budget)}",
            *(percent(run["summary"]["by_task"][task], 0) for task in tasks),
        ]
        for run in content["runs"]
        if run["method"] == FULL or run["budget"] == budget
    ]
    return table(["method", *tasks], rows)


def _text_overview(name: str) -> str:
    content = load(name)
    found = [run["summary"]["exact"] for run in content["runs"]]
    widest = max(max(one["high"] - one["mean"], one["mean"] - one["low"]) for one in found)
    documents = found[0]["documents"]
    note = f"{documents} documents; 95 % intervals reach at most {100 * widest:.1f} points to a side."
    return f"{overview(content)}\n\n{note}"
