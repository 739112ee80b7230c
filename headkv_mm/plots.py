# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a compressed cache did: head map, kept tokens, side by side, quality against bytes.

The figures are made without pyplot, so nothing global changes and any thread may draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headkv_mm.pictures import compare_picture as compare_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headkv_mm.image_grid import ImageGrid

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")  # one after the other when the colours are used up
GLOBAL_COLOUR, LOCAL_COLOUR = COLOURS[0], COLOURS[4]

_MOST_ANNOTATED = 16  # heads or layers; with more, numbers would overlap
_DROPPED = (0.80, 0.68, 0.80)  # tint of a token that is no longer held
_MOST_PANELS = 8  # layers or heads of a kept-token map


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def head_map(report: Any, title: str | None = None) -> Figure:
    """Layer by head: entries held at the end, and the head's type.

    Args:
        report: a `CacheReport`, or anything with its `lengths` and `types`.
        title: heading; by default method and budget of the report.

    Returns:
        A figure with the mean entries over the rows of the batch and, for a method with head types, the share of rows
        in which the head was local.
    """
    held = np.array([[np.mean(column) for column in zip(*layer)] for layer in report.lengths])  # [layers, heads]
    local = _local_share(report.types)
    layers, heads = held.shape
    panels = 1 if local is None else 2
    width = min(max(0.5 * heads, 2.6), 9.0)
    height = min(max(0.42 * layers, 2.0), 9.0)
    figure = new_figure(panels * (width + 1.4), height + 1.2)
    figure.suptitle(title or f"Head map of {report.method}", fontsize=12)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    heat_map(figure, axes[0], held, "Entries held per KV head", "cividis", "{:.0f}", 0.0, float(held.max()))
    if local is not None:
        _type_map(figure, axes[1], local)
    return figure


def kept_token_map(
    kept: Sequence[Sequence[Any]], image: Any, grid: ImageGrid, title: str = "Image tokens held at the end"
) -> Figure:
    """Which image tokens every head still holds, drawn over the image.

    Args:
        kept: for every layer and KV head the raster indices of the tokens held, as `ImageOutput.kept_tokens[image]`.
        image: the PIL image.
        grid: the image's tokens.
        title: heading.

    Returns:
        A figure: the image, how many heads hold each token, and one panel per layer and head in which tokens that
        were dropped are violet. Of more than eight layers or heads, eight are drawn.
    """
    from matplotlib.ticker import MaxNLocator

    masks = [[_mask(head, grid) for head in layer] for layer in kept]  # [layers][heads] bool [H, W]
    layers = _spread(len(masks), _MOST_PANELS)
    heads = _spread(len(masks[0]), _MOST_PANELS)
    pixels = np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)
    side = 1.15
    figure = new_figure(3.3 + side * len(heads), max(side * len(layers) + 0.8, 5.2))
    figure.suptitle(f"{title} (violet: dropped)", fontsize=12)
    left, right = figure.subfigures(1, 2, width_ratios=(3.0, side * len(heads)))
    above, below = left.subplots(2, 1)
    above.imshow(pixels, interpolation="nearest")
    above.set_title("Image", fontsize=10)
    counts = np.sum([mask for layer in masks for mask in layer], axis=0)
    total = len(masks) * len(masks[0])
    drawn = below.imshow(counts, cmap="cividis", vmin=0, vmax=total, interpolation="nearest")
    below.set_title(f"Heads that hold a token (of {total})", fontsize=10)
    left.colorbar(drawn, ax=below, shrink=0.8, ticks=MaxNLocator(5, integer=True))
    panels = right.subplots(len(layers), len(heads), squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes, mask = panels[row][column], masks[layer][head]
            axes.imshow(_dimmed(pixels, mask), interpolation="nearest")
            axes.set_xlabel(f"{int(mask.sum())} held", fontsize=7, labelpad=1)
            if row == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    for axes in (above, below, *panels.flat):
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def quality_vs_bytes(
    results: Iterable[Any],
    *,
    quality_name: str = "Share of images that are right",
    title: str = "Quality against bytes",
) -> Figure:
    """Quality of every method over the bytes its cache held.

    Args:
        results: records, dicts or objects, with `method`, `bytes_ratio` (bytes held as a share of the full cache),
            `quality`, and `low` and `high` (ends of the interval; None for none). The method "none" is the full cache
            and becomes a dashed line.
        quality_name: label of the vertical axis.
        title: heading.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    records = [record if isinstance(record, Mapping) else _fields(record) for record in results]
    if not records:
        raise ValueError("there are no results to plot: pass at least one record")
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(str(record["method"]), []).append(record)
    full = by_method.pop("none", [])
    for record in full[:1]:
        axes.axhline(record["quality"], color="0.35", linestyle="--", linewidth=1.2, label="full cache")
        if record.get("low") is not None and record.get("high") is not None:
            axes.axhspan(record["low"], record["high"], color="0.35", alpha=0.10, linewidth=0)
    for index, (method, points) in enumerate(by_method.items()):
        points = sorted(points, key=lambda record: float(record["bytes_ratio"]))
        x = [float(record["bytes_ratio"]) for record in points]
        y = [float(record["quality"]) for record in points]
        errors = [
            [value - _or(record.get("low"), value) for value, record in zip(y, points)],
            [_or(record.get("high"), value) - value for value, record in zip(y, points)],
        ]
        axes.errorbar(
            x,
            y,
            yerr=np.maximum(errors, 0),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            linestyle=LINES[index // len(COLOURS) % len(LINES)],
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            label=method,
        )
    axes.set_xscale("log", base=2)
    ratios = [float(record["bytes_ratio"]) for points in by_method.values() for record in points] or [1.0]
    powers = range(math.floor(math.log2(min(ratios))), max(math.ceil(math.log2(max(ratios))), 0) + 1)
    axes.set_xticks([2.0**power for power in powers])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Bytes held, as a share of the full cache")
    axes.set_ylabel(quality_name)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(by_method) > len(COLOURS):
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, handlelength=4)
    else:
        axes.legend(frameon=False)
    return figure


def heat_map(
    figure: Figure, axes: Axes, values: npt.NDArray[Any], title: str, colours: str, form: str, low: float, high: float
) -> None:
    """A layer-by-head map with a bar, and numbers while they are readable."""
    drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
    _name_axes(axes, values.shape, title)
    figure.colorbar(drawn, ax=axes, shrink=0.85)
    if max(values.shape) <= _MOST_ANNOTATED:
        middle = (low + high) / 2
        for (layer, head), value in np.ndenumerate(values):
            colour = "white" if value < middle else "black"
            axes.text(head, layer, form.format(value), ha="center", va="center", fontsize=7, color=colour)


def _type_map(figure: Figure, axes: Axes, local: npt.NDArray[Any]) -> None:
    """A layer-by-head map from global to local."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    colours = LinearSegmentedColormap.from_list("types", [GLOBAL_COLOUR, "#f4f4f4", LOCAL_COLOUR])
    axes.imshow(local, cmap=colours, vmin=0, vmax=1, aspect="auto")
    _name_axes(axes, local.shape, "Head type (% of rows local)")
    if max(local.shape) <= _MOST_ANNOTATED:
        for (layer, head), value in np.ndenumerate(local):
            colour = "white" if value < 0.25 else "black"
            axes.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    legend = [Patch(color=GLOBAL_COLOUR, label="global"), Patch(color=LOCAL_COLOUR, label="local")]
    axes.legend(handles=legend, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)


def _name_axes(axes: Axes, shape: tuple[int, ...], title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("KV head")
    axes.set_ylabel("Layer")
    axes.set_xticks(range(0, shape[1], math.ceil(shape[1] / _MOST_ANNOTATED)))
    axes.set_yticks(range(0, shape[0], math.ceil(shape[0] / _MOST_ANNOTATED)))


def _local_share(types: Sequence[Sequence[Sequence[str]]] | None) -> npt.NDArray[np.float64] | None:
    """Share of rows in which a head is local, [layers, heads]; None without head types."""
    if not types:
        return None
    return np.array([[np.mean([kind == "local" for kind in column]) for column in zip(*layer)] for layer in types])


def _mask(indices: Any, grid: ImageGrid) -> npt.NDArray[np.bool_]:
    """Raster indices as bool [height, width]; newline tokens are left out."""
    flat = np.zeros(grid.tokens, dtype=bool)
    flat[np.asarray(indices, dtype=np.int64)] = True
    return flat.reshape(grid.height, grid.row_stride)[:, : grid.width]


def _dimmed(pixels: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The image with the tokens outside the mask pale and violet, a tint that no token that is held has by chance."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    held = mask[rows][:, columns][..., None]
    tint = 0.2 * pixels.mean(axis=-1, keepdims=True) + 0.8 * np.array(_DROPPED, np.float32)
    result: npt.NDArray[np.float32] = np.where(held, pixels, tint).astype(np.float32)
    return result


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spaced, the first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a record object that a plot reads."""
    names = ("method", "budget", "bytes_ratio", "quality", "low", "high")
    return {name: getattr(record, name) for name in names if hasattr(record, name)}


def _or(value: Any, otherwise: float) -> float:
    return otherwise if value is None else float(value)
