# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a compressed cache kept of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headkv_mm.plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS = 600  # a longer text is drawn in bins of several tokens
_MOST_NAMED_HEADS = 32
_STRIP = 1.1  # inches


def document_map(
    kept: Sequence[Sequence[Any]], tokens: int, title: str = "What each head kept of the document"
) -> Figure:
    """Which parts of a text every head still holds.

    Args:
        kept: for every layer and KV head the positions held, as `Document.kept_positions()`.
        tokens: tokens of the text.
        title: heading.

    Returns:
        A figure: above, the share of all heads that hold a place; below, one line per layer and KV head, darker where
        more of the tokens there are held. Long texts are drawn in bins of several tokens.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if tokens < 1 or not kept or not kept[0]:
        raise ValueError("there is nothing to draw: no tokens or no heads")
    width = -(-tokens // _MOST_COLUMNS)  # tokens per bin
    rows = [_shares(head, tokens, width) for layer in kept for head in layer]
    shares = np.stack(rows)  # [layers * heads, bins]
    heads = [len(layer) for layer in kept]
    height = min(max(0.11 * len(shares), 1.6), 9.0)
    figure = new_figure(10.0, height + _STRIP + 1.3)
    bins = "" if width == 1 else f" ({width} tokens per column)"
    figure.suptitle(f"{title}{bins}", fontsize=12)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(_STRIP, height))
    edges = np.minimum(np.arange(shares.shape[1] + 1) * width, tokens)
    mean = shares.mean(axis=0)
    above.stairs(100 * mean, edges, fill=True, color=COLOURS[0], alpha=0.85, linewidth=0)
    above.set_ylim(0, 100)
    above.set_yticks([0, 50, 100])
    above.set_ylabel("% of heads", fontsize=8)
    above.tick_params(labelsize=8)
    above.spines[["top", "right"]].set_visible(False)
    drawn = below.pcolormesh(edges, np.arange(len(shares) + 1), shares, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    below.invert_yaxis()
    below.set_xlim(0, tokens)
    below.set_xlabel("Position in the document (tokens)")
    _name_layers(below, heads)
    if width > 1:
        bar = figure.colorbar(drawn, ax=(above, below), shrink=0.6, pad=0.02)
        bar.set_label("share of the column's tokens held", fontsize=8)
    return figure


def _name_layers(axes: Any, heads: Sequence[int]) -> None:
    """A name per layer in the middle of its heads, a line between two layers, numbers of heads while they fit."""
    starts = np.concatenate([[0], np.cumsum(heads)])
    for start in starts[1:-1]:
        axes.axhline(start, color="0.3", linewidth=0.6)
    total = int(starts[-1])
    if total <= _MOST_NAMED_HEADS:
        names = [f"layer {layer}, head {head}" for layer, count in enumerate(heads) for head in range(count)]
        axes.set_yticks(np.arange(total) + 0.5, names)
    else:
        step = -(-len(heads) // _MOST_NAMED_HEADS)
        shown = range(0, len(heads), step)
        axes.set_yticks([(starts[layer] + starts[layer + 1]) / 2 for layer in shown], [f"layer {n}" for n in shown])
    axes.tick_params(axis="y", labelsize=6.5, length=0)


def _shares(positions: Any, tokens: int, width: int) -> npt.NDArray[np.float64]:
    """Share of every bin's tokens that is held, float64 [bins]."""
    held = np.zeros(tokens, dtype=bool)
    held[np.asarray(positions, dtype=np.int64)] = True
    starts = np.arange(0, tokens, width)
    sizes = np.diff(np.append(starts, tokens))
    counts: npt.NDArray[np.float64] = np.add.reduceat(held.astype(np.float64), starts)
    return counts / sizes
