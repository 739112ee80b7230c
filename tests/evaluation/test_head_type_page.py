# SPDX-License-Identifier: Apache-2.0
"""Figures of the page on head types are drawn from results alone, and show what these say."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .text_model import tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def run(entries: str, division: str, budget: float, mean: float) -> dict[str, Any]:
    right = {"mean": mean, "low": mean - 0.1, "high": mean + 0.05}
    method = f"{entries}+{division}" if entries else "none"
    return {
        "method": method,
        "entries": entries,
        "division": division,
        "budget": budget,
        "bytes_ratio": budget,
        "right": right,
    }


RUNS = [
    run("", "", 1.0, 0.95),
    *(run("keys", division, budget, 0.5) for division in ("equal", "pooled", "two groups") for budget in (0.25, 0.125)),
    *(run("newest", "equal", budget, 0.3) for budget in (0.25, 0.125)),
]


def test_forms_are_compared_by_division_and_by_entries(scripts: Any) -> None:
    found = scripts("allocation_curves").panels(RUNS)
    assert {title: list(lines) for title, lines in found.items()} == {
        "Entries kept for: keys": ["equal", "pooled", "two groups"],
        "Division: equal": ["keys", "newest"],
    }
    assert [one["budget"] for one in found["Division: equal"]["newest"]] == [0.25, 0.125]


def test_curves_have_a_line_for_every_form(scripts: Any) -> None:
    curves = scripts("allocation_curves")
    figure = curves.curves_figure({"runs": RUNS}, "Title")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [len(axes.get_legend().get_texts()) for axes in shown] == [3, 2]
    line = next(line for line in shown[1].lines if line.get_label() == "newest")
    assert list(line.get_xdata()) == [0.125, 0.25]
    assert list(line.get_ydata()) == pytest.approx([30, 30])
    assert "10 points" in figure.get_suptitle()
    with pytest.raises(ValueError, match="nothing to compare"):
        curves.curves_figure({"runs": RUNS[:1]}, "Title")


def kept_content() -> dict[str, Any]:
    kept = [[[0, 1, 255], [0, 17]], [[0], []]]
    image = {"method": "a", "options": {}, "tokens": [0] * 256, "right": True, "kept": kept}
    image["tokens"][:2] = [5, 5]
    text = {"method": "b", "options": {"scorer": "keydiff"}, "answer": "7", "right": True, "kept": kept}
    return {
        "images": {"caption": "a scene", "budget": 1 / 8, "rows": 8, "methods": [image, image]},
        "text": {"budget": 1 / 8, "tokens": 300, "evidence": [[0, 1], [17, 18]], "methods": [text]},
    }


def test_kept_tokens_are_counted_by_place(scripts: Any) -> None:
    plots = scripts("kept_token_plots")
    content = kept_content()
    kept = content["images"]["methods"][0]["kept"]
    counts = plots.held_by(kept)
    assert (counts[0, 0], counts[0, 1], counts[1, 1], counts[15, 15], counts.sum()) == (3, 1, 1, 1, 6)
    shapes = plots.shape_tokens(content["images"]["methods"][0]["tokens"])
    assert np.argwhere(shapes).tolist() == [[0, 0], [0, 1]]
    assert plots.held_evidence(kept, [[0, 1], [255, 255]]) == 1
    assert plots.held_evidence(kept, [[0, 0]]) == 3
    assert plots.held_evidence(kept, [[0, 1], [17, 17]]) == 0  # each by another head
    assert plots.held_map(kept, 300)[1].nonzero()[0].tolist() == [0, 17]


def test_the_pictures_of_kept_tokens_are_drawn(scripts: Any, tmp_path: Path) -> None:
    drawn = scripts("kept_token_plots").draw_all(kept_content(), tmp_path)
    assert {path.name for path in drawn} == {"image.png", "text.png", "budgets.png"}
    for path in drawn:
        with Image.open(path) as picture:
            assert min(picture.size) > 200


def test_spans_are_the_tokens_of_the_values(scripts: Any) -> None:
    from headkv_mm.demo.documents import make_document

    words = tokenizer()
    document = make_document("multi-query", random.Random(4), 200, lambda text: len(words(text)["input_ids"]))
    spans = scripts("kept_token_maps").evidence_spans(document, words)
    ids = words(document.text)["input_ids"]
    said = [words.decode(ids[first : last + 1]).replace(" ", "") for first, last in spans]
    assert said == [answer.replace(" ", "") for answer in document.questions[0].answers]
