# SPDX-License-Identifier: Apache-2.0
"""Quality against bytes of every allocation form, from what `benchmarks/allocation_forms.py` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headkv_mm.evaluation.settings import FULL
from headkv_mm.plots import COLOURS, LINES, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_DIVISIONS = 3
"""A way to choose entries has a panel of its own if so many divisions were tried with it."""
UNDIVIDED = ("equal", "two groups")
"""Divisions with which ways to choose entries are compared."""
COLUMNS = 2

Run = Mapping[str, Any]


def panels(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Panel title -> line -> its runs.

    A panel for every way to choose entries that many divisions were tried with, whose lines are divisions; and one for
    each of the two plain divisions, whose lines are ways to choose entries.
    """
    compressed = [run for run in runs if run["method"] != FULL]
    divisions: dict[str, set[str]] = {}
    for run in compressed:
        divisions.setdefault(run["entries"], set()).add(run["division"])
    found: dict[str, dict[str, list[Run]]] = {}
    for run in compressed:
        if len(divisions[run["entries"]]) >= LEAST_DIVISIONS:
            found.setdefault(f"Entries kept for: {run['entries']}", {}).setdefault(run["division"], []).append(run)
    for division in UNDIVIDED:
        lines: dict[str, list[Run]] = {}
        for run in (run for run in compressed if run["division"] == division):
            lines.setdefault(run["entries"], []).append(run)
        if len(lines) > 1:
            found[f"Division: {division}"] = lines
    return found


def curves_figure(part: Mapping[str, Any], title: str) -> Figure:
    """A panel for every comparison, its lines named from best to worst; a division looks the same in all panels.

    Args:
        part: "images" or "text" of results.json.
        title: heading.

    Raises:
        ValueError: if nothing can be compared.
    """
    found = panels(part["runs"])
    if not found:
        raise ValueError("there is nothing to compare: no way to choose entries has several divisions")
    names = list(dict.fromkeys(name for title, lines in found.items() if title.startswith("Entries") for name in lines))
    rows = math.ceil(len(found) / COLUMNS)
    figure = new_figure(6.0 * min(len(found), COLUMNS), 3.9 * rows + 0.5)
    found_right = [run["right"] for run in part["runs"]]
    widest = max(max(one["high"] - one["mean"], one["mean"] - one["low"]) for one in found_right)
    figure.suptitle(f"{title} (95 % intervals reach at most {100 * widest:.0f} points to a side)", fontsize=12)
    places = list(figure.subplots(rows, min(len(found), COLUMNS), squeeze=False).flat)
    full = next((run for run in part["runs"] if run["method"] == FULL), None)
    held = [run["bytes_ratio"] for lines in found.values() for runs in lines.values() for run in runs]
    for axes, (heading, lines) in zip(places, found.items()):
        best_first = sorted(lines.items(), key=lambda line: -_at_fewest_bytes(line[1]))
        for index, (name, runs) in enumerate(best_first):
            _draw_line(axes, name, runs, names.index(name) if heading.startswith("Entries") else index)
        if full is not None:
            axes.axhline(100 * full["right"]["mean"], color="0.35", linestyle="--", linewidth=1)
        axes.set_title(heading, fontsize=10)
        _name_axes(axes, min(held), max(held))
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    for axes in places[len(found) :]:
        axes.set_visible(False)
    return figure


def _at_fewest_bytes(runs: Sequence[Run]) -> float:
    return float(min(runs, key=lambda run: float(run["bytes_ratio"]))["right"]["mean"])


def _draw_line(axes: Axes, name: str, runs: Sequence[Run], style: int) -> None:
    ordered = sorted(runs, key=lambda run: float(run["bytes_ratio"]))
    x, y = [run["bytes_ratio"] for run in ordered], [100 * run["right"]["mean"] for run in ordered]
    colour = COLOURS[style % len(COLOURS)]
    line = LINES[style // len(COLOURS) % len(LINES)]
    axes.plot(x, y, color=colour, marker=MARKERS[style % len(MARKERS)], markersize=4, linestyle=line, label=name)


def _name_axes(axes: Axes, least: float, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    halves = range(2 * math.floor(math.log2(least)), 2 * math.ceil(math.log2(most)) + 1)
    axes.set_xticks([2.0 ** (power / 2) for power in halves])
    axes.set_xlim(least / 1.08, most * 1.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.2g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Bytes held, as a share of the full cache", fontsize=9)
    axes.set_ylabel("% right", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
