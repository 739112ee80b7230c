# SPDX-License-Identifier: Apache-2.0
"""Sums up runs: means over captions, intervals, and differences to the full cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headkv_mm.demo.scenes import Scene, caption, unseen_scenes
from headkv_mm.evaluation.bootstrap import Estimate, estimate, paired_difference, resampling_counts
from headkv_mm.evaluation.images import COUNTS, OUTCOMES, says_same
from headkv_mm.evaluation.settings import FULL, EvaluationSettings, budget_label

FIDELITY = ("agreement", "kl", "agreement_all", "kl_all")
FORMAT = 1


def summarise(
    run: Mapping[str, Any], full: Mapping[str, Any], same: npt.NDArray[np.bool_], counts: Any
) -> dict[str, Any]:
    """Estimates of one run.

    Args:
        run: a run as its file has it.
        full: the full cache's.
        same: [captions] bool, captions that leave a colour to the image.
        counts: bootstrap counts, the same for all runs.

    Returns:
        Bytes as a share of the full cache's, and estimates (mean, low, high, captions): every outcome and its paired
        difference to the full cache, "all_right" apart for captions with and without "same", "same_colour" for those
        with it, and the fidelity, if it was measured.
    """
    outcomes, reference, nbytes = run["outcomes"], full["outcomes"], run["bytes_per_image"]
    absolute, difference = {}, {}
    for name in (*OUTCOMES, *COUNTS):
        which = same if name == "same_colour" else None
        absolute[name] = estimate(outcomes[name], counts, which)
        difference[name] = paired_difference(outcomes[name], reference[name], counts, which)
    for name, which in (("all_right_same", same), ("all_right_named", ~same)):
        absolute[name] = estimate(outcomes["all_right"], counts, which)
        difference[name] = paired_difference(outcomes["all_right"], reference["all_right"], counts, which)
    fidelity = run["fidelity"]
    return {
        "bytes_ratio": nbytes["nbytes"] / nbytes["nbytes_full"],
        "peak_ratio": nbytes["nbytes_peak"] / nbytes["nbytes_full"],
        "outcomes": {name: _plain(found) for name, found in absolute.items()},
        "difference_to_full": {name: _plain(found) for name, found in difference.items()},
        "fidelity": None if fidelity is None else {name: _plain(estimate(fidelity[name], counts)) for name in FIDELITY},
    }


def results(
    settings: EvaluationSettings, runs: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        settings: what was run.
        runs: the runs' files, the full cache first.
        origin: versions and commit.
    """
    scenes = unseen_scenes(settings.captions, settings.seed)
    same = np.array([says_same(scene) for scene in scenes], dtype=bool)
    counts = resampling_counts(len(scenes), settings.resamples, settings.seed)
    full = next(run for run in runs if run["method"] == FULL)
    return {
        "format": FORMAT,
        "origin": dict(origin),
        "settings": {**full["shared"], "resamples": settings.resamples},
        "captions": _captions(scenes, same),
        "runs": [
            {
                **{name: value for name, value in run.items() if name not in ("shared", "pictured_tokens")},
                "summary": summarise(run, full, same, counts),
            }
            for run in runs
        ],
    }


def plot_records(content: Mapping[str, Any], quality: str = "all_right") -> list[dict[str, Any]]:
    """Records for `headkv_mm.plots.quality_vs_bytes`."""
    records = []
    for run in content["runs"]:
        found = run["summary"]["outcomes"][quality]
        records.append(
            {
                "method": run["method"],
                "budget": "" if run["budget"] is None else budget_label(run["budget"]),
                "bytes_ratio": run["summary"]["bytes_ratio"],
                "quality": found["mean"],
                "low": found["low"],
                "high": found["high"],
            }
        )
    return records


def _captions(scenes: list[Scene], same: npt.NDArray[np.bool_]) -> dict[str, list[Any]]:
    return {"text": [caption(scene) for scene in scenes], "same": [int(flag) for flag in same]}


def _plain(found: Estimate | None) -> dict[str, float | int] | None:
    return None if found is None else found.to_dict("captions")
