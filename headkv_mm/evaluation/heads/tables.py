# SPDX-License-Identifier: Apache-2.0
"""The readable table of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headkv_mm.evaluation.tables import percent, table

KINDS = {
    "online": "known when the method decides",
    "others": "measured on other items",
    "bound": "bounds",
}


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of `results.json` content, as Markdown."""
    settings, needs = content["settings"], content["needs"]
    images = settings["material"] == "images"
    when = (
        f"after {settings['rows']} rows; the condition always stays"
        if images
        else f"at the end of a document of {settings['length']} tokens, before any question; row: its last "
        f"{settings['window']} queries"
    )
    share = percent(settings["share"], 0)
    parts = [
        f"# What foretells the entries that a head needs: {settings['material']}",
        f"{settings['items']} unseen {content['unit']}, seed {settings['seed']}; full cache. Decided {when}. "
        f"{settings['dtype']} on {settings['device']}; model {settings['model']}; commit "
        f"{content['origin']['commit'] or 'unknown'}. In brackets: 95 % bootstrap intervals over {content['unit']}.",
        f"Need: the fewest entries with which a head retains {share} of its attention in the rest of the generation, "
        "what stays anyway included. Regret: with the same entries in total, divided by what is predicted (a floor of "
        f"{percent(settings['floor'], 0)} of the mean for every head), and every head keeping the entries that will "
        "get most: points of attention, mean over the heads, less than the best division retains.",
        *(
            f"## {name}\n\n{overview(content, kind)}"
            for kind, name in ((kind, name[0].upper() + name[1:]) for kind, name in KINDS.items())
        ),
        "## Which entries, with the same number for every head",
        "Points of attention less than the entries that will get most retain.",
        rankings(content),
        "## Divisions where the entries are chosen by what is known",
        "The same divisions of all the model's entries, but every head keeps the entries that got most attention from "
        "the last row before the choice: points of attention more than the same number for every head retains.",
        _ranked(content),
        "## Needs by head",
        f"Mean entries; in brackets those that held {share} of the last row's attention when the method decided "
        f"({needs['early_entries']:.0f} entries were there; {needs['late_entries']:.0f} at the last choice)."
        + (
            f" Which head it is explains {percent(needs['explained_by_head'], 0)} of the variance of the needs."
            if needs["explained_by_head"] is not None
            else ""
        ),
        _by_head(needs),
    ]
    return "\n\n".join(parts) + "\n"


def overview(content: Mapping[str, Any], kind: str | None = None, names: Sequence[str] | None = None) -> str:
    """Rank correlation and regret of some predictors.

    Args:
        content: of `results.json`.
        kind: only those of a kind.
        names: only these.
    """
    budgets = content["settings"]["budgets"]
    rows = []
    for one in content["predictors"]:
        if (kind is not None and one["kind"] != kind) or (names is not None and one["name"] not in names):
            continue
        regrets = [
            number(one["budgets"][budget][scope]["regret"], 100) for scope in ("model", "layer") for budget in budgets
        ]
        ranks = [_rank(one["spearman"][scope]) for scope in ("model", "layer")]
        rows.append([one["name"], one["form"], *ranks, *regrets])
    heads = [f"regret {budget}, {name}" for name in ("whole model", "inside layers") for budget in budgets]
    return table(["predictor", "division", "Spearman", "inside layers", *heads], rows)


def _rank(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else number(found, 1)


def number(found: Mapping[str, float], factor: float = 1.0, *, sign: bool = False) -> str:
    """An estimate with two digits, such as "0.94 [0.93, 0.95]"."""
    form = "+.2f" if sign else ".2f"
    mean, low, high = (format(round(factor * found[name], 2) + 0.0, form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def rankings(content: Mapping[str, Any]) -> str:
    """What every ranking loses with the same number of entries for every head."""
    budgets = content["settings"]["budgets"]
    rows = [[one["name"], *(number(one["lost"][budget], 100) for budget in budgets)] for one in content["rankings"]]
    return table(["kept first", *budgets], rows)


def _ranked(content: Mapping[str, Any]) -> str:
    budgets = content["settings"]["budgets"]
    rows = [
        [
            one["name"],
            *(number(one["budgets"][budget]["model"]["ranked_over_uniform"], 100, sign=True) for budget in budgets),
        ]
        for one in content["predictors"]
    ]
    return table(["division by", *budgets], rows)


def _by_head(needs: Mapping[str, Any]) -> str:
    rows = [
        [str(layer), *(f"{late:.1f} ({early:.1f})" for late, early in zip(*both, strict=True))]
        for layer, both in enumerate(zip(needs["late"], needs["early"], strict=True))
    ]
    return table(["layer", *(f"KV head {head}" for head in range(len(needs["late"][0])))], rows)
