# SPDX-License-Identifier: Apache-2.0
"""The readable tables of an evaluation of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import interval, percent, table

Run = Mapping[str, Any]


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of `results.json` content, as Markdown."""
    settings, runs = content["settings"], content["runs"]
    when = (
        "Document and first question are read together and then compressed (query-aware)"
        if settings["query_aware"]
        else "The document is compressed before any question is known (query-agnostic)"
    )
    parts = [
        "# Questions about documents in a compressed KV cache",
        f"{settings['documents']} unseen documents of every task and length ({_words(settings['tasks'])}; "
        f"{_words(settings['lengths'])} tokens), seed {settings['seed']}, the same documents for every method. {when}; "
        f"greedy answers. {settings['dtype']} on {settings['device']}; model {settings['model']}; commit "
        f"{content['origin']['commit'] or 'unknown'}. In brackets: 95 % bootstrap intervals over documents.",
        "## All methods at equal budgets",
        "Share of documents whose questions are all answered with all their values. The best of each budget is bold.",
        overview(content),
        "## Quality and bytes",
        "Held: all bytes that the cache holds of the document, bookkeeping included, as a share of a full cache. Peak: "
        "the same for the most that every layer held, which is the whole prompt while it is read. Values found: the "
        "mean share of the values. Difference: of the share of right documents to the full cache's, document by "
        "document.",
        _quality(runs),
        "## By task",
        _by(runs, "by_task", settings["tasks"], str),
        "## By length",
        _by(runs, "by_length", settings["lengths"], lambda length: f"{length} tokens"),
    ]
    return "\n\n".join(parts) + "\n"


def overview(content: Mapping[str, Any]) -> str:
    """Methods down, budgets across: share of documents that are right, best methods first."""
    runs = content["runs"]
    budgets = list(dict.fromkeys(run["budget"] for run in runs if run["method"] != FULL))
    right = {(run["method"], run["budget"]): run["summary"]["exact"]["mean"] for run in runs}
    methods = list(dict.fromkeys(run["method"] for run in runs if run["method"] != FULL))
    methods.sort(key=lambda method: -sum(right[method, budget] for budget in budgets))
    best = {budget: max(right[method, budget] for method in methods) for budget in budgets}
    rows = [["full cache", *[percent(right[FULL, None])] * len(budgets)]]
    for method in methods:
        cells = []
        for budget in budgets:
            text = percent(right[method, budget])
            cells.append(f"**{text}**" if right[method, budget] == best[budget] > 0 else text)
        rows.append([f"`{method}`", *cells])
    return table(["method", *(budget_label(budget) for budget in budgets)], rows)


def _quality(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        summary = run["summary"]
        rows.append(
            [
                *_names(run),
                percent(summary["bytes_ratio"]),
                percent(summary["peak_ratio"]),
                interval(summary["exact"]),
                "" if run["method"] == FULL else interval(summary["difference_to_full"], sign=True),
                interval(summary["partial"]),
            ]
        )
    return table(["method", "budget", "held", "peak", "documents right", "difference", "values found"], rows)


def _by(runs: Sequence[Run], name: str, groups: Sequence[Any], label: Callable[[Any], str]) -> str:
    rows = [[*_names(run), *(percent(run["summary"][name][str(group)]) for group in groups)] for run in runs]
    return table(["method", "budget", *map(label, groups)], rows)


def _names(run: Run) -> list[str]:
    if run["method"] == FULL:
        return ["full cache", ""]
    options = {name: value for name, value in run["options"].items() if name != "seed"}
    extra = f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""
    return [run["method"] + extra, budget_label(run["budget"])]


def _words(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
