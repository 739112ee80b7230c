# SPDX-License-Identifier: Apache-2.0
"""The readable table of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headkv_mm.evaluation.settings import FULL, budget_label

_PARTS = {"shape": "shapes", "colour": "colours", "place": "places", "background": "background"}
_COUNTED = {"extra": "extra", "missing": "missing", "unreadable": "unreadable"}


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of `results.json` content, as Markdown."""
    settings, runs = content["settings"], content["runs"]
    captions, same = settings["captions"], sum(content["captions"]["same"])
    sampling = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items() if value is not None)
    parts = [
        "# Images with a compressed KV cache",
        f"{captions} unseen captions ({same} of them with a colour called `same`), seed {settings['seed']}, the same "
        f"random numbers for every method; first eviction after {settings['first_eviction_rows']} rows for all; "
        f"{sampling}; {settings['dtype']} on {settings['device']}; model {settings['model']}; "
        f"commit {content['origin']['commit'] or 'unknown'}. In brackets: 95 % bootstrap intervals over captions.",
        "## Quality",
        "Bytes: all bytes that the cache holds at the end, bookkeeping included, as a share of a full cache. All "
        "right: background, places, shapes and colours all as the caption says. Difference: to the full cache, "
        "caption by caption. Agreement and KL: next-token distributions on the full cache's images, over the tokens "
        "that an eviction can change.",
        _quality(runs),
        "## What goes wrong",
        "Share of images in which all of a kind are right, and the mean number of cells with something extra, missing "
        "or unreadable. The last three columns split the captions by whether a colour is called `same`.",
        _attributes(runs),
        "## Bytes per image",
        _bytes(runs),
    ]
    typed = [run for run in runs if run["labels"]]
    if typed:
        parts += [
            "## Head types",
            "Share of local heads when the types are decided, after the last row, and of labels that the last row "
            "would have given differently; on the full cache's attention, for several tau (the method's own in bold).",
            "\n\n".join(_types(run) for run in typed),
        ]
    return "\n\n".join(parts) + "\n"


def _quality(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        summary = run["summary"]
        fidelity = summary["fidelity"]
        rows.append(
            [
                *_names(run),
                percent(summary["bytes_ratio"]),
                interval(summary["outcomes"]["all_right"]),
                "" if run["method"] == FULL else interval(summary["difference_to_full"]["all_right"], sign=True),
                percent(fidelity["agreement"]["mean"], 2) if fidelity else "",
                f"{fidelity['kl']['mean']:.2g}" if fidelity else "",
            ]
        )
    return table(["method", "budget", "bytes", "all right", "difference", "agreement", "KL (nats)"], rows)


def _attributes(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        found = run["summary"]["outcomes"]
        rows.append(
            [
                *_names(run),
                *(percent(found[name]["mean"]) for name in _PARTS),
                *(f"{found[name]['mean']:.3f}" for name in _COUNTED),
                *(interval(found[name]) for name in ("same_colour", "all_right_same", "all_right_named")),
            ]
        )
    heads = ["shared colour kept", "all right, `same`", "all right, no `same`"]
    return table(["method", "budget", *_PARTS.values(), *_COUNTED.values(), *heads], rows)


def _bytes(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        found = run["bytes_per_image"]
        names = ("nbytes", "kv_nbytes", "bookkeeping_nbytes", "nbytes_peak", "nbytes_full")
        share = "" if run["local_share"] is None else percent(run["local_share"])
        rows.append([*_names(run), *(f"{found[name]:,.0f}" for name in names), share])
    return table(
        ["method", "budget", "held", "keys and values", "bookkeeping", "peak", "full cache", "local heads"], rows
    )


def _types(run: Mapping[str, Any]) -> str:
    own = run["options"].get("tau", 0.9)
    rows = []
    for line in run["labels"]:
        tau = f"{line['tau']:g}"
        shares = (line[name] for name in ("local_early", "local_late", "changed", "changed_of_local"))
        rows.append([f"**{tau}**" if line["tau"] == own else tau, *(percent(share) for share in shares)])
    heads = ["tau", "local, early", "local, last row", "labels changed", "of the local ones"]
    return f"{' '.join(_names(run))}\n\n{table(heads, rows)}"


def _names(run: Mapping[str, Any]) -> list[str]:
    options = {
        name: value for name, value in run["options"].items() if not name.endswith("_rows") or name == "window_rows"
    }
    extra = f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else ""
    if run["method"] == FULL:
        return ["full cache", ""]
    return [run["method"] + extra, budget_label(run["budget"])]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    """A share as text, such as "17.3 %"."""
    return f"{100 * share:.{digits}f} %"


def interval(found: Mapping[str, float] | None, *, sign: bool = False) -> str:
    """An estimate of a share as text, such as "88.3 % [84.4, 92.2]"; a dash where there is none."""
    if found is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    # Adding zero takes the sign off a zero.
    mean, low, high = (format(round(100 * found[name], 1) + 0.0, form) for name in ("mean", "low", "high"))
    return f"{mean} {'points' if sign else '%'} [{low}, {high}]"
