# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation: run, sum up, write the files that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkv_mm import plots
from headkv_mm.evaluation.origin import commit, versions
from headkv_mm.evaluation.pictures import picture_grid
from headkv_mm.evaluation.runner import Runner
from headkv_mm.evaluation.settings import EvaluationSettings
from headkv_mm.evaluation.storage import read_json, write_atomically, write_json, write_text
from headkv_mm.evaluation.summary import plot_records, results
from headkv_mm.evaluation.tables import markdown


def evaluate(model: Any, settings: EvaluationSettings, folder: Path, *, progress: bool = True) -> dict[str, Any]:
    """Evaluate a model; runs that `folder` has already are not run again.

    Writes `results.json` (settings, versions, every caption's outcome, estimates), `table.md`, `quality_vs_bytes.png`
    and `pictures.png`; `runs/` has a file per method and budget.

    Args:
        model: a LlamaGen model of the embedded world, on its device.
        settings: what to run.
        folder: where the files go; it is made if it is not there.
        progress: draw a bar on stderr.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: if the settings do not fit the model or what the folder holds.
    """
    runs = Runner(model, settings, folder / "runs", progress=progress).run()
    write_json(folder / "results.json", results(settings, runs, {"versions": versions(), "commit": commit()}))
    content = read_json(folder / "results.json")
    write_text(folder / "table.md", markdown(content))
    figure = plots.quality_vs_bytes(plot_records(content), title="Images that are all right, against bytes")
    write_atomically(folder / "quality_vs_bytes.png", lambda path: figure.savefig(path))
    if settings.pictures:
        picture = picture_grid(model, content["captions"]["text"], runs)
        write_atomically(folder / "pictures.png", lambda path: picture.save(path))
    return content
