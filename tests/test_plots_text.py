# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from headkv_mm.plots_text import document_map


def test_short_texts_are_drawn_token_by_token() -> None:
    kept = [[torch.tensor([0, 3]), torch.tensor([0, 1, 2])], [torch.tensor([4]), torch.tensor([0, 4])]]
    figure = document_map(kept, tokens=5, title="a title")
    above, below = figure.axes
    drawn = np.asarray(below.collections[0].get_array()).reshape(4, 5)
    assert drawn.tolist() == [[1, 0, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]]
    (strip,) = above.patches
    assert strip.get_data().values.tolist() == [75, 25, 25, 25, 50]
    assert [label.get_text() for label in below.get_yticklabels()][1] == "layer 0, head 1"
    assert figure._suptitle.get_text() == "a title"


def test_long_texts_are_drawn_in_bins() -> None:
    tokens = 1501
    kept = [[torch.arange(0, tokens, 2), torch.arange(tokens - 100, tokens)]]
    figure = document_map(kept, tokens)
    below = figure.axes[1]
    drawn = np.asarray(below.collections[0].get_array()).reshape(2, -1)
    assert drawn.shape[1] == 501
    assert drawn[0].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn[1, :467].sum() == 0 and drawn[1, 468:].min() == 1
    assert "3 tokens per column" in figure._suptitle.get_text()


def test_many_heads(tmp_path: object) -> None:
    kept = [[torch.tensor([layer])] * 8 for layer in range(40)]
    figure = document_map(kept, tokens=40)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels[:2] == ["layer 0", "layer 2"]
    figure.canvas.draw()


def test_nothing_to_draw() -> None:
    for kept, tokens in (([], 5), ([[]], 5), ([[torch.tensor([0])]], 0)):
        with pytest.raises(ValueError, match="nothing to draw"):
            document_map(kept, tokens)
