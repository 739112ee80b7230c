# SPDX-License-Identifier: Apache-2.0
"""The catalogue of allocation forms fits the library, and the script compares forms on small models."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from headkv_mm import registry
from headkv_mm.evaluation.storage import write_json
from headkv_mm.fingerprint import fingerprint

from .text_model import small_text_model, tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NEEDS = [[1.0, 4.0], [2.0, 3.0]]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # what is registered here is gone afterwards
    return importlib.import_module


def test_every_form_has_a_name_of_its_own_and_known_pieces(benchmark: Any) -> None:
    catalogue = benchmark("allocation_catalogue")
    images, text = catalogue.image_forms(NEEDS), catalogue.text_forms()
    for forms, kind in ((images, "image"), (text, "text")):
        assert len({form.method for form in forms}) == len(forms)
        assert len({(form.entries, form.division) for form in forms}) == len(forms)
        for form in (form for form in forms if form.pieces is None):
            assert registry.get_method(form.method).pieces(kind) is not None
    catalogue.register_forms(images, text)
    assert registry.get_method("logits+needs").image.allocator.scores == ((1.0, 4.0), (2.0, 3.0))
    assert not any("needs" in form.method for form in catalogue.image_forms(None))


def test_the_script_compares_forms(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = benchmark("allocation_forms")
    monkeypatch.setattr(forms, "open_text_model", lambda *_: (small_text_model(), tokenizer()))
    arguments = ["text", "--documents", "1", "--length", "192", "--text-budgets", "1/4", "--output", str(tmp_path)]
    forms.main([*arguments, "--runs", str(tmp_path / "runs"), "--only", "keydiff,keys+curves-model"])
    part = json.loads((tmp_path / "results.json").read_text())["text"]
    named = [(run["method"], run["entries"], run["division"]) for run in part["runs"]]
    assert named == [("none", "", ""), ("keydiff", "keys", "equal"), ("keys+curves-model", "keys", "curves")]
    assert all(run["right"]["documents"] == 7 for run in part["runs"])
    assert "| keys | curves | `keys+curves-model` | 1/4 |" in (tmp_path / "table.md").read_text()


def test_needs_of_another_model_are_refused(benchmark: Any, tmp_path: Path) -> None:
    forms, model = benchmark("allocation_forms"), small_text_model()
    path = tmp_path / "results.json"
    write_json(path, {"settings": {"model": fingerprint(model)}, "needs": {"late": NEEDS}})
    assert forms.needs_of(path, model) == NEEDS
    with pytest.raises(ValueError, match="measured on another model"):
        forms.needs_of(path, small_text_model(seed=1))
