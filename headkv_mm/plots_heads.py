# SPDX-License-Identifier: Apache-2.0
"""A picture of a head table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from headkv_mm.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headkv_mm.head_tables import HeadTable

_MOST_ANNOTATED = 16  # heads or layers; with more, numbers would overlap


def head_table_map(table: HeadTable, title: str | None = None) -> Figure:
    """Layer by head: what the table says of every query head, and of every KV head.

    Args:
        table: the table.
        title: heading; by default how it was measured.

    Returns:
        A figure with each query head's share of all scores, and where query heads share KV heads also each KV head's,
        both in percent.
    """
    query = np.array(table.scores)
    query = 100 * query / query.sum()
    panels = [("Query head", query)]
    if table.kv_heads != table.query_heads:
        panels.append(("KV head", 100 * table.kv_scores().numpy()))
    widths = [min(max(0.5 * values.shape[1], 2.6), 9.0) for _, values in panels]
    figure = new_figure(sum(widths) + 1.4 * len(panels), min(max(0.42 * table.layers, 2.0), 9.0) + 1.2)
    figure.suptitle(title or f"Head scores ({table.answered} of {table.examples} prompts count)", fontsize=12)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for place, (name, values) in zip(axes, panels):
        drawn = place.imshow(values, cmap="cividis", vmin=0, vmax=values.max(), aspect="auto")
        figure.colorbar(drawn, ax=place, shrink=0.85)
        place.set_title(f"% of all scores, by {name.replace('Query', 'query')}", fontsize=10)
        place.set_xlabel(name)
        place.set_ylabel("Full-attention layer")
        _ticks(place, values)
    return figure


def _ticks(axes: Axes, values: npt.NDArray[np.float64]) -> None:
    """Numbers of layers and heads, and the values themselves while they are readable."""
    axes.set_xticks(range(0, values.shape[1], math.ceil(values.shape[1] / _MOST_ANNOTATED)))
    axes.set_yticks(range(0, values.shape[0], math.ceil(values.shape[0] / _MOST_ANNOTATED)))
    if max(values.shape) <= _MOST_ANNOTATED:
        for (layer, head), value in np.ndenumerate(values):
            colour = "white" if value < values.max() / 2 else "black"
            axes.text(head, layer, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
