# SPDX-License-Identifier: Apache-2.0
"""The pooled results of `allocation_held_out.py` as Markdown; the documents show the same tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import percent
from headkv_mm.evaluation.tables import table as markdown

MEASURES = {  # title, factor, digits, unit
    "right": ("right", 100, 1, " %"),
    "values": ("values found", 100, 1, " %"),
    "kl": ("KL, 1/1000 nats per token", 1000, 2, ""),
}
TITLES = {"images": "Images", "text": "Texts"}


def table(content: Mapping[str, Any]) -> str:
    """Everything that results.json says, kind by kind."""
    lines = ["# The chosen rules on captions and documents that no choice was made on", ""]
    for kind in (kind for kind in TITLES if kind in content):
        lines += [f"## {TITLES[kind]}", "", described(content[kind]), "", quality(content[kind]), ""]
        lines += ["Intervals that do not overlap:", "", verdicts(content[kind]), ""]
    return "\n".join(lines)


def described(part: Mapping[str, Any]) -> str:
    """What was run."""
    seeds = part["settings"]["seeds"]
    return (
        f"{part['items']} {part['unit']} (seeds {', '.join(map(str, seeds))}). In brackets: 95 % bootstrap intervals "
        f"over all of them. Difference: `{part['settings']['chosen']}` less the method, item by item."
    )


def quality(part: Mapping[str, Any]) -> str:
    """Bytes and every measure of every method, budget by budget."""
    measures = measured(part)
    chosen = part["settings"]["chosen"]
    differences = {(one["budget"], one["method"]): one for one in part["differences"]}
    rows = [
        [
            "full cache" if run["method"] == FULL else f"`{label(run)}`",
            "" if run["budget"] is None else budget_label(run["budget"]),
            percent(run["bytes_ratio"]),
            *(interval(run[name], name) for name in measures),
            *(
                ""
                if run["method"] == FULL
                else interval(differences[run["budget"], run["method"]][name], name, sign=True)
                if run["method"] != chosen
                else ""
                for name in measures
            ),
        ]
        for run in by_budget(part["runs"])
    ]
    heads = [MEASURES[name][0] for name in measures]
    return markdown(["method", "budget", "held", *heads, *(f"difference: {head}" for head in heads)], rows)


def verdicts(part: Mapping[str, Any]) -> str:
    """Budget by budget which methods the chosen one is better than, and worse."""
    rows = [
        [
            budget_label(one["budget"]),
            MEASURES[one["measure"]][0],
            *(", ".join(f"`{name}`" for name in one[side]) or "none" for side in ("better", "overlapping", "worse")),
            ", ".join(f"`{name}`" for name in one["more_bytes_than"]) or "none",
        ]
        for one in part["verdicts"]
    ]
    chosen = part["settings"]["chosen"]
    heads = ["budget", "by", f"`{chosen}` is better than", "overlaps", "is worse than", "holds more bytes than"]
    return markdown(heads, rows)


def by_budget(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The full cache, then budget by budget, methods in the order in which they ran."""
    budgets = list(dict.fromkeys(run["budget"] for run in runs))
    return [run for budget in budgets for run in runs if run["budget"] == budget]


def measured(part: Mapping[str, Any]) -> list[str]:
    """Names of the measures that a part has, in order."""
    return [name for name in MEASURES if any(run.get(name) is not None for run in part["runs"])]


def label(run: Mapping[str, Any]) -> str:
    """A method with the options that are not the same for all."""
    options = {name: value for name, value in run["options"].items() if not name.endswith("_rows")}
    return run["method"] + (f" {', '.join(f'{name}={value}' for name, value in options.items())}" if options else "")


def interval(found: Mapping[str, float] | None, name: str, *, sign: bool = False) -> str:
    """Mean and 95 % bootstrap interval, in the measure's unit; a dash where there is none."""
    if found is None:
        return "-"
    _, factor, digits, unit = MEASURES[name]
    form = f"{'+' if sign else ''}.{digits}f"
    # Adding zero takes the sign off a zero.
    mean, low, high = (format(round(factor * found[key], digits) + 0.0, form) for key in ("mean", "low", "high"))
    return f"{mean}{'' if sign else unit} [{low}, {high}]"
