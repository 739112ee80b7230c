# SPDX-License-Identifier: Apache-2.0
"""Sums up runs of text: means over documents, intervals, and differences to the full cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headkv_mm.evaluation.bootstrap import Estimate, estimate, paired_difference, resampling_counts
from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.text.settings import Cell, TextSettings

FORMAT = 1
BYTES = ("nbytes", "nbytes_peak", "nbytes_full")

Run = Mapping[str, Any]


class Documents:
    """The documents of all cells in one line, and how often every resample draws each of them.

    Documents are drawn within their cell, so that every resample has the same mix of tasks and lengths.

    Args:
        cells: what is summed up.
        documents: per cell.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    def __init__(self, cells: Sequence[Cell], documents: int, resamples: int, seed: int) -> None:
        self.cells = list(cells)
        self.task = np.repeat([cell.task for cell in cells], documents)
        self.length = np.repeat([cell.length for cell in cells], documents)
        streams = np.random.SeedSequence(seed).generate_state(len(self.cells))
        self.counts = np.concatenate([resampling_counts(documents, resamples, int(one)) for one in streams], axis=1)

    def partial(self, run: Run) -> npt.NDArray[np.float64]:
        """Share of the values found in every document."""
        return np.concatenate([np.asarray(run["cells"][str(cell)]["partial"], np.float64) for cell in self.cells])

    def exact(self, run: Run) -> npt.NDArray[np.float64]:
        """1 for every document whose values were all found."""
        found: npt.NDArray[np.float64] = (self.partial(run) == 1).astype(np.float64)
        return found

    def bytes_of(self, run: Run, name: str) -> float:
        """Mean bytes per document."""
        return float(np.mean([run["cells"][str(cell)][name] for cell in self.cells]))


def summarise(run: Run, full: Run, documents: Documents) -> dict[str, Any]:
    """Estimates of one run.

    Returns:
        Bytes held and at most, as shares of a full cache's; "exact" (all values found) and "partial" (share of the
        values found) as estimates; the paired difference of "exact" to the full cache; and "exact" by task, length and
        cell.
    """
    exact, reference = documents.exact(run), documents.exact(full)
    full_bytes = documents.bytes_of(run, "nbytes_full")
    return {
        "bytes_ratio": documents.bytes_of(run, "nbytes") / full_bytes,
        "peak_ratio": documents.bytes_of(run, "nbytes_peak") / full_bytes,
        "exact": _plain(estimate(exact, documents.counts)),
        "partial": _plain(estimate(documents.partial(run), documents.counts)),
        "difference_to_full": _plain(paired_difference(exact, reference, documents.counts)),
        "by_task": _means(exact, documents.task),
        "by_length": _means(exact, documents.length),
        "by_cell": {
            str(cell): float(exact[(documents.task == cell.task) & (documents.length == cell.length)].mean())
            for cell in documents.cells
        },
    }


def results(settings: TextSettings, runs: Sequence[Run], origin: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        settings: what was run.
        runs: the runs' files, the full cache first.
        origin: versions and commit.
    """
    cells = settings.cells()
    documents = Documents(cells, settings.documents, settings.resamples, settings.seed)
    full = next(run for run in runs if run["method"] == FULL)
    return {
        "format": FORMAT,
        "origin": dict(origin),
        "settings": {
            **full["shared"],
            "tasks": list(dict.fromkeys(settings.tasks)),
            "lengths": sorted(set(settings.lengths)),
            "resamples": settings.resamples,
        },
        "runs": [
            {
                "method": run["method"],
                "budget": run["budget"],
                "options": run["options"],
                "cells": {str(cell): run["cells"][str(cell)] for cell in cells},
                "summary": summarise(run, full, documents),
            }
            for run in runs
        ],
    }


def plot_records(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records for `headkv_mm.plots.quality_vs_bytes`."""
    return [
        {
            "method": run["method"],
            "budget": "" if run["budget"] is None else budget_label(run["budget"]),
            "bytes_ratio": run["summary"]["bytes_ratio"],
            "quality": run["summary"]["exact"]["mean"],
            "low": run["summary"]["exact"]["low"],
            "high": run["summary"]["exact"]["high"],
        }
        for run in content["runs"]
    ]


def depth_tables(content: Mapping[str, Any], task: str) -> dict[str, dict[tuple[float, int], float]]:
    """Share of exact answers of every method by depth and length, the mean over its budgets.

    Returns:
        For every method a dict (depth, length) -> share; empty if the task was not run.
    """
    found: dict[str, dict[tuple[float, int], list[float]]] = {}
    for run in content["runs"]:
        for name, cell in run["cells"].items():
            ran, _, length = name.partition("/")
            if ran != task or cell["depth"] is None:
                continue
            for depth, partial in zip(cell["depth"], cell["partial"], strict=True):
                found.setdefault(run["method"], {}).setdefault((depth, int(length)), []).append(float(partial == 1))
    return {
        method: {key: sum(values) / len(values) for key, values in cells.items()} for method, cells in found.items()
    }


def _means(values: npt.NDArray[np.float64], groups: npt.NDArray[Any]) -> dict[str, float]:
    return {str(group): float(values[groups == group].mean()) for group in dict.fromkeys(groups.tolist())}


def _plain(found: Estimate | None) -> dict[str, float | int] | None:
    return None if found is None else found.to_dict("documents")
