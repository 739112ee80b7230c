# SPDX-License-Identifier: Apache-2.0
"""Sums and tables of text evaluations, on results made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headkv_mm.evaluation.text.plots import depth_by_length
from headkv_mm.evaluation.text.settings import Cell, TextSettings
from headkv_mm.evaluation.text.summary import Documents, depth_tables, plot_records, results, summarise
from headkv_mm.evaluation.text.tables import markdown, overview

SETTINGS = TextSettings(tasks=("single", "list"), lengths=(64,), budgets=(1 / 4, 1 / 8), documents=4, resamples=400)
SHARED = {
    "documents": 4,
    "seed": 0,
    "query_aware": True,
    "batch_size": 4,
    "model": "abc",
    "dtype": "float32",
    "device": "cpu",
}


def run(method: str, budget: float | None, single: list[float], listed: list[float], held: int) -> dict[str, Any]:
    sizes = {"nbytes": held, "nbytes_peak": held + 10, "nbytes_full": 100}
    return {
        "shared": SHARED,
        "method": method,
        "budget": budget,
        "options": {},
        "cells": {
            "single/64": {"partial": single, "depth": [0.0, 0.5, 1.0, 0.0], **sizes},
            "list/64": {"partial": listed, "depth": None, **sizes},
        },
    }


FULL = run("none", None, [1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 1.0, 1.0], 100)
RUNS = [
    FULL,
    run("streaming", 1 / 4, [0.0, 0.0, 1.0, 0.0], [0.25, 0.0, 0.0, 1.0], 25),
    run("streaming", 1 / 8, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], 13),
    run("snapkv", 1 / 4, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.5, 1.0], 25),
    run("snapkv", 1 / 8, [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.0], 13),
]
ORIGIN = {"versions": {}, "commit": None}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return results(SETTINGS, RUNS, ORIGIN)


def test_means_and_differences(content: dict[str, Any]) -> None:
    summary = content["runs"][3]["summary"]
    assert summary["exact"]["mean"] == 6 / 8
    assert summary["exact"]["documents"] == 8
    assert summary["partial"]["mean"] == 6.5 / 8
    # One document is better than with the full cache, two are worse.
    assert summary["difference_to_full"]["mean"] == pytest.approx(-1 / 8)
    assert summary["by_task"] == {"single": 3 / 4, "list": 3 / 4}
    assert summary["by_length"] == {"64": 6 / 8}
    assert summary["by_cell"] == {"single/64": 3 / 4, "list/64": 3 / 4}
    assert (summary["bytes_ratio"], summary["peak_ratio"]) == (0.25, 0.35)


def test_every_resample_has_the_same_mix_of_cells() -> None:
    documents = Documents([Cell("single", 64), Cell("list", 64)], 4, 300, seed=1)
    assert documents.counts.shape == (300, 8)
    assert (documents.counts[:, :4].sum(1) == 4).all()
    assert (documents.counts[:, 4:].sum(1) == 4).all()
    # Cells are drawn independently of each other.
    assert abs(np.corrcoef(documents.counts[:, 0], documents.counts[:, 4])[0, 1]) < 0.2
    certain = run("snapkv", 1 / 4, [1.0] * 4, [0.0] * 4, 25)
    found = summarise(certain, FULL, documents)["exact"]
    assert (found["low"], found["mean"], found["high"]) == (0.5, 0.5, 0.5)


def test_the_overview_puts_the_best_first_and_in_bold(content: dict[str, Any]) -> None:
    assert overview(content).splitlines() == [
        "| method | 1/4 | 1/8 |",
        "| --- | --- | --- |",
        "| full cache | 87.5 % | 87.5 % |",
        "| `snapkv` | **75.0 %** | **25.0 %** |",
        "| `streaming` | 25.0 % | 12.5 % |",
    ]


def test_the_table_says_when_it_was_compressed(content: dict[str, Any]) -> None:
    text = markdown(content)
    assert "(query-aware)" in text
    assert "| streaming | 1/8 | 13.0 % | 23.0 % | 12.5 % [" in text
    assert "| snapkv | 1/4 | 75.0 % | 75.0 % |" in text
    agnostic = {**content, "settings": {**content["settings"], "query_aware": False}}
    assert "(query-agnostic)" in markdown(agnostic)


def test_depth_is_the_mean_over_budgets(content: dict[str, Any]) -> None:
    tables = depth_tables(content, "single")
    assert tables["snapkv"] == {(0.0, 64): 0.5, (0.5, 64): 0.5, (1.0, 64): 1.0}
    assert tables["none"] == {(0.0, 64): 1.0, (0.5, 64): 1.0, (1.0, 64): 1.0}
    assert depth_tables(content, "list") == {}
    figure = depth_by_length(tables, "title")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["full cache", "streaming", "snapkv"]
    with pytest.raises(ValueError, match="nothing to draw"):
        depth_by_length({}, "title")


def test_records_of_the_plot(content: dict[str, Any]) -> None:
    records = plot_records(content)
    assert [(record["method"], record["budget"]) for record in records][:2] == [("none", ""), ("streaming", "1/4")]
    assert records[3]["bytes_ratio"] == 0.25
    assert records[3]["low"] <= records[3]["quality"] <= records[3]["high"]
