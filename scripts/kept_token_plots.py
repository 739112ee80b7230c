# SPDX-License-Identifier: Apache-2.0
"""Pictures of the kept tokens that `kept_token_maps.py` wrote; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headkv_mm.demo.patches import tokens_to_image
from headkv_mm.demo.scenes import GRID_SIZE, PATCH_SIZE
from headkv_mm.evaluation.settings import budget_label
from headkv_mm.evaluation.storage import write_atomically
from headkv_mm.plots import COLOURS, heat_map, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kept = Sequence[Sequence[Sequence[int]]]
"""Positions by layer and KV head."""

EVIDENCE = COLOURS[1]


def draw_all(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the three pictures into a folder, and say which files they are."""
    figures = {
        "image.png": image_figure(content["images"]),
        "text.png": text_figure(content["text"]),
        "budgets.png": budgets_figure(content),
    }
    for name, figure in figures.items():
        write_atomically(folder / name, figure.savefig)
    return [folder / name for name in figures]


def image_figure(part: Mapping[str, Any]) -> Figure:
    """What every method drew, and how many heads hold each token after the upper rows; shapes are outlined."""
    from matplotlib.colors import PowerNorm

    methods, rows = part["methods"], part["rows"]
    figure = new_figure(3.0 * len(methods), 5.6)
    figure.suptitle(
        f"{part['caption']}\nAbove: what was drawn. Below: what is held of rows 1 to {rows} when row {rows + 1} begins "
        f"({budget_label(part['budget'])} of the entries)",
        fontsize=11,
    )
    panels = figure.subplots(2, len(methods), squeeze=False, height_ratios=(GRID_SIZE, rows + 2))
    for above, below, one in zip(*panels, methods, strict=True):
        shapes = shape_tokens(one["tokens"])
        above.imshow(
            tokens_to_image(np.array(one["tokens"])), interpolation="nearest", extent=(0, GRID_SIZE, GRID_SIZE, 0)
        )
        above.axhline(rows, color="black", linestyle=":", linewidth=1.4)
        above.set_title(f"{label(one)}: {'right' if one['right'] else 'wrong'}", fontsize=11)
        counts, heads = held_by(one["kept"])[:rows], sum(len(layer) for layer in one["kept"])
        drawn = below.imshow(
            counts, cmap="magma", norm=PowerNorm(0.5, 0, heads), interpolation="nearest", extent=(0, GRID_SIZE, rows, 0)
        )
        # The newest row stays in every head whatever is chosen.
        older, on_shapes = counts[:-1].sum(), counts[:-1][shapes[: rows - 1]].sum()
        below.set_title(f"{on_shapes} of {older} entries before\nrow {rows} are on the shape", fontsize=9)
        outline(above, shapes)
        outline(below, shapes[:rows])
        for axes in (above, below):
            axes.set_xticks([])
            axes.set_yticks([])
    bar = figure.colorbar(drawn, ax=list(panels[1]), shrink=0.9, pad=0.02, ticks=[0, 1, 2, 5, 10, heads])
    bar.set_label(f"KV heads (of {heads})", fontsize=9)
    return figure


def held_by(kept: Kept) -> npt.NDArray[np.int64]:
    """How many heads hold each image token, int64 [16, 16]."""
    counts = np.zeros(GRID_SIZE * GRID_SIZE, dtype=np.int64)
    for layer in kept:
        for head in layer:
            counts[np.asarray(head, dtype=np.int64)] += 1
    return counts.reshape(GRID_SIZE, GRID_SIZE)


def shape_tokens(tokens: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Tokens on which something other than the background was drawn, bool [16, 16]."""
    pixels = tokens_to_image(np.asarray(tokens)).reshape(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE, 3)
    patches = pixels.swapaxes(1, 2).reshape(GRID_SIZE * GRID_SIZE, -1, 3)
    colours, counts = np.unique(patches.reshape(-1, 3), axis=0, return_counts=True)
    other = (patches != colours[counts.argmax()]).any(axis=(1, 2))
    return np.asarray(other.reshape(GRID_SIZE, GRID_SIZE))


def outline(axes: Axes, mask: npt.NDArray[np.bool_]) -> None:
    """Draw a line around the True tokens."""
    padded = np.pad(mask, 1)
    lines = []
    for row, column in np.argwhere(padded):
        top, left = row - 1, column - 1
        for (down, right), ends in (
            ((-1, 0), ((left, top), (left + 1, top))),
            ((1, 0), ((left, top + 1), (left + 1, top + 1))),
            ((0, -1), ((left, top), (left, top + 1))),
            ((0, 1), ((left + 1, top), (left + 1, top + 1))),
        ):
            if not padded[row + down, column + right]:
                lines.append(ends)
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(lines, colors="black", linewidths=2.6))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=1.2))


def text_figure(part: Mapping[str, Any]) -> Figure:
    """A line per head, dark where an entry is held; the values that the question asks for are marked."""
    methods, tokens = part["methods"], part["tokens"]
    heads = sum(len(layer) for layer in methods[0]["kept"])
    figure = new_figure(11.0, 1.0 + len(methods) * (0.6 + 0.125 * heads))
    figure.suptitle(
        f"Entries held of a document, a line per KV head ({budget_label(part['budget'])} of {tokens:,} tokens);\n"
        "orange: the values that a question asks for which nobody knew yet",
        fontsize=11,
    )
    panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for axes, one in zip(panels, methods, strict=True):
        held = held_map(one["kept"], tokens)
        axes.pcolormesh(
            np.arange(tokens + 1), np.arange(len(held) + 1), held, cmap="Greys", vmin=0, vmax=1.15, rasterized=True
        )
        marked = held_evidence(one["kept"], part["evidence"])
        values = len(part["evidence"])
        for first, last in part["evidence"]:
            axes.axvspan(first, last + 1, color=EVIDENCE, alpha=0.35, linewidth=0)
            axes.plot([(first + last + 1) / 2], [-0.45], marker="v", color=EVIDENCE, markersize=6, clip_on=False)
        axes.set_title(
            f"{label(one)}: {'right' if one['right'] else 'wrong'}; {marked} of {heads} heads hold all {values} values",
            fontsize=10,
            pad=10,
        )
        axes.set_ylim(len(held), 0)
        axes.set_xlim(0, tokens)
        name_layers(axes, [len(layer) for layer in one["kept"]])
    panels[-1].set_xlabel("Position in the document (tokens)")
    return figure


def held_map(kept: Kept, tokens: int) -> npt.NDArray[np.float64]:
    """1 where a head holds a position, float64 [layers * heads, tokens]."""
    rows = [head for layer in kept for head in layer]
    held = np.zeros((len(rows), tokens))
    for index, head in enumerate(rows):
        held[index, np.asarray(head, dtype=np.int64)] = 1.0
    return held


def held_evidence(kept: Kept, evidence: Sequence[Sequence[int]]) -> int:
    """How many heads hold all tokens of all values."""
    wanted = {position for first, last in evidence for position in range(first, last + 1)}
    return sum(wanted <= set(head) for layer in kept for head in layer)


def name_layers(axes: Axes, heads: Sequence[int]) -> None:
    """A name in the middle of every layer's heads, a line between two layers."""
    starts = np.concatenate([[0], np.cumsum(heads)])
    for start in starts[1:-1]:
        axes.axhline(float(start), color=COLOURS[0], linewidth=0.6)
    axes.set_yticks((starts[:-1] + starts[1:]) / 2, [f"layer {layer}" for layer in range(len(heads))], fontsize=8)
    axes.tick_params(axis="y", length=0)


def budgets_figure(content: Mapping[str, Any]) -> Figure:
    """Entries that every head holds, by layer and head: how the methods divide the same number."""
    parts = [(name, content[name]) for name in ("images", "text")]
    columns = max(len(part["methods"]) for _, part in parts)
    figure = new_figure(3.3 * columns, 6.6)
    figure.suptitle("Entries held by every KV head", fontsize=12)
    panels = figure.subplots(len(parts), columns, squeeze=False)
    for row, (name, part) in zip(panels, parts, strict=True):
        held = [np.array([[len(head) for head in layer] for layer in one["kept"]]) for one in part["methods"]]
        most = float(max(values.max() for values in held))
        for axes, one, values in zip(row, part["methods"], held):
            title = f"{name}, {budget_label(part['budget'])}: {label(one)}"
            heat_map(figure, axes, values, title, "cividis", "{:.0f}", 0.0, most)
        for axes in row[len(held) :]:
            axes.set_visible(False)
    return figure


def label(one: Mapping[str, Any]) -> str:
    """A method with its options."""
    options = ", ".join(f"{name}={value}" for name, value in one["options"].items())
    return f"{one['method']} ({options})" if options else str(one["method"])
