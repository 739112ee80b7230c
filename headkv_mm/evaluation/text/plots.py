# SPDX-License-Identifier: Apache-2.0
"""Depth by length: where in a document of which length a needle is still found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from headkv_mm.evaluation.settings import FULL
from headkv_mm.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 4


def depth_by_length(tables: Mapping[str, Mapping[tuple[float, int], float]], title: str) -> Figure:
    """One heat map per method.

    Args:
        tables: for every method, (depth, length) -> share of documents answered right.
        title: heading.

    Raises:
        ValueError: if there are no tables.
    """
    if not tables:
        raise ValueError("there is nothing to draw: no task with a needle depth was run")
    depths = sorted({depth for cells in tables.values() for depth, _ in cells})
    lengths = sorted({length for cells in tables.values() for _, length in cells})
    down = math.ceil(len(tables) / _ACROSS)
    figure = new_figure(2.6 * min(_ACROSS, len(tables)) + 1.2, 2.3 * down + 0.9)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(down, min(_ACROSS, len(tables)), squeeze=False, sharex=True, sharey=True)
    drawn = None
    for axes in panels.flat[len(tables) :]:
        axes.set_axis_off()
    for axes, (method, cells) in zip(panels.flat, tables.items()):
        values = np.array([[cells.get((depth, length), np.nan) for length in lengths] for depth in depths])
        drawn = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title("full cache" if method == FULL else method, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=8)
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value < 0.5 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.supxlabel("Tokens of the document", fontsize=9)
    figure.supylabel("Depth of the needle", fontsize=9)
    figure.colorbar(drawn, ax=panels, shrink=0.8, label="documents right")
    return figure
