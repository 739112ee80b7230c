# SPDX-License-Identifier: Apache-2.0
"""A picture of what heads need, and of what foretells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headkv_mm.plots import COLOURS, heat_map, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "online": ("known when the method decides", COLOURS[0]),
    "others": ("measured on other items", COLOURS[2]),
    "bound": ("bounds", "#999999"),
}


def needs_figure(content: Mapping[str, Any]) -> Figure:
    """Maps of the entries that heads need, early and late, and the rank correlation of every predictor.

    Args:
        content: of `results.json` of `headkv-mm evaluate heads`.
    """
    needs, predictors = content["needs"], content["predictors"]
    early, late = np.array(needs["early"]), np.array(needs["late"])
    figure = new_figure(12.5, max(6.0, 0.23 * len(predictors) + 1.5))
    figure.suptitle(
        f"Entries that heads need, and what foretells them: {content['settings']['material']} "
        f"({content['settings']['items']} {content['unit']})",
        fontsize=12,
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.7))
    upper, lower = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    share = f"{100 * content['settings']['share']:.0f} %"
    titles = (
        f"Early: best entries with {share} of the\nlast row's attention when the method decides",
        f"Late: best entries with {share} of the\nattention in the rest of the generation",
    )
    for axes, values, title in zip((upper, lower), (early, late), titles, strict=True):
        heat_map(figure, axes, values, title, "cividis", "{:.1f}", 0.0, max(float(values.max()), 1.0))
    _bars(figure.add_subplot(grid[:, 1]), predictors)
    return figure


def _bars(axes: Axes, predictors: Sequence[Mapping[str, Any]]) -> None:
    """Spearman with intervals; predictors without any are left out."""
    known = [one for one in predictors if one["spearman"]["model"] is not None]
    places = np.arange(len(known))[::-1]
    for kind, (label, colour) in _KINDS.items():
        chosen = [index for index, one in enumerate(known) if one["kind"] == kind]
        found = [known[index]["spearman"]["model"] for index in chosen]
        means: npt.NDArray[np.float64] = np.array([one["mean"] for one in found])
        ends = np.array([[one["mean"] - one["low"], one["high"] - one["mean"]] for one in found]).reshape(-1, 2).T
        axes.barh(places[chosen], means, xerr=ends.clip(0), color=colour, label=label, ecolor="black", capsize=1.5)
    axes.set_yticks(places, [f"{one['name']} ({one['form']})" for one in known], fontsize=7)
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.set_xlim(-1.02, 1.02)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("Spearman with the entries needed, over all heads of the model")
    axes.legend(loc="lower left", fontsize=8)
