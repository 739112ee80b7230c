# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headkv_mm import plots
from headkv_mm.image_grid import ImageGrid

LENGTHS = [[[4, 8], [6, 8]], [[1, 3], [1, 5]], [[2, 2], [2, 2]]]  # 3 layers, 2 rows, 2 heads


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_head_map_shows_means_over_rows() -> None:
    figure = plots.head_map(SimpleNamespace(method="lines", lengths=LENGTHS, types=None), "my title")
    axes, *rest = [axes for axes in figure.axes if axes.get_xlabel() == "KV head"]
    assert rest == []
    assert _texts(axes) == ["5", "8", "1", "4", "2", "2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[5, 8], [1, 4], [2, 2]])
    assert figure.get_suptitle() == "my title"


def test_head_map_shows_types() -> None:
    types = [[["local", "global"], ["local", "local"]], [["global", "global"]] * 2, [["local", "local"]] * 2]
    figure = plots.head_map(SimpleNamespace(method="headkv", lengths=LENGTHS, types=types))
    _, axes = [axes for axes in figure.axes if axes.get_xlabel() == "KV head"]
    assert _texts(axes) == ["100", "50", "0", "0", "100", "100"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["global", "local"]


def test_large_head_maps_have_no_numbers() -> None:
    figure = plots.head_map(SimpleNamespace(method="lines", lengths=np.ones((40, 1, 32)).tolist(), types=None))
    assert _texts(figure.axes[0]) == []
    assert len(figure.axes[0].get_yticks()) <= 16


def test_kept_token_map_counts_and_dims() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    kept = [[[0, 1], [0]], [[0], [3]]]  # 2 layers, 2 heads; grid of 2x2 tokens of 4 pixels
    figure = plots.kept_token_map(kept, image, ImageGrid(2, 2))
    counts = next(axes for axes in figure.axes if axes.get_title().startswith("Heads that hold"))
    np.testing.assert_array_equal(counts.images[0].get_array(), [[3, 1], [0, 1]])
    panels = [axes for axes in figure.axes if axes.get_xlabel().endswith("held")]
    assert [axes.get_xlabel() for axes in panels] == ["2 held", "1 held", "1 held", "1 held"]
    pixels = np.asarray(panels[0].images[0].get_array())
    red = np.array([1.0, 0.0, 0.0])
    assert np.allclose(pixels[:4], red)
    assert not np.isclose(pixels[4:], red).all(axis=-1).any()


def test_kept_token_map_leaves_newline_tokens_out() -> None:
    figure = plots.kept_token_map([[[2, 3]]], Image.new("RGB", (4, 4)), ImageGrid(2, 2, row_stride=3))
    counts = next(axes for axes in figure.axes if axes.get_title().startswith("Heads that hold"))
    np.testing.assert_array_equal(counts.images[0].get_array(), [[0, 0], [1, 0]])


def test_kept_token_map_of_a_large_model_draws_eight_of_each() -> None:
    kept = [[[0]] * 20 for _ in range(30)]
    figure = plots.kept_token_map(kept, Image.new("RGB", (4, 4)), ImageGrid(2, 2))
    panels = [axes for axes in figure.axes if axes.get_xlabel().endswith("held")]
    assert len(panels) == 64
    assert [axes.get_ylabel() for axes in panels if axes.get_ylabel()][-1] == "layer 29"


def test_quality_vs_bytes() -> None:
    records: list[Any] = [
        {"method": "none", "budget": 1.0, "bytes_ratio": 1.0, "quality": 0.9, "low": 0.85, "high": 0.95},
        {"method": "headkv", "budget": 0.5, "bytes_ratio": 0.5, "quality": 0.8, "low": 0.7, "high": 0.9},
        {"method": "headkv", "budget": 0.25, "bytes_ratio": 0.25, "quality": 0.6, "low": None, "high": None},
        SimpleNamespace(method="lines", budget=0.5, bytes_ratio=0.5, quality=0.7, low=0.6, high=0.75),
    ]
    (axes,) = plots.quality_vs_bytes(records).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["full cache", "headkv", "lines"]
    headkv = next(item for item in axes.containers if item.get_label() == "headkv")
    np.testing.assert_allclose(headkv.lines[0].get_xydata(), [[0.25, 0.6], [0.5, 0.8]])
    with pytest.raises(ValueError, match="no results to plot"):
        plots.quality_vs_bytes([])


def test_compare_picture_keeps_token_edges() -> None:
    checks = Image.new("RGB", (2, 2), "white")
    checks.putpixel((0, 0), (10, 20, 30))
    picture = plots.compare_picture([("full", checks, ["1 MiB"]), ("headkv", checks, [])], "a heading " * 20, side=64)
    assert picture.width == 24 + 2 * (64 + 24)
    colours = picture.getcolors(maxcolors=100_000)
    assert (2 * 32 * 32, (10, 20, 30)) in colours
    with pytest.raises(ValueError, match="no images to compare"):
        plots.compare_picture([])


def test_pyplot_is_not_needed() -> None:
    plots.head_map(SimpleNamespace(method="lines", lengths=LENGTHS, types=None)).canvas.draw()
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []
