# SPDX-License-Identifier: Apache-2.0
"""A whole measurement: run, sum up, write the files that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkv_mm.evaluation.heads.material import Material
from headkv_mm.evaluation.heads.runner import measure_all, shared_settings
from headkv_mm.evaluation.heads.settings import HeadSettings
from headkv_mm.evaluation.heads.summary import results
from headkv_mm.evaluation.heads.tables import markdown
from headkv_mm.evaluation.origin import commit, versions
from headkv_mm.evaluation.storage import read_json, write_atomically, write_json, write_text
from headkv_mm.plots_head_needs import needs_figure


def evaluate_heads(
    material: Material, settings: HeadSettings, folder: Path, *, progress: bool = True
) -> dict[str, Any]:
    """Measure what heads need and what foretells it; what `folder` has already is not run again.

    Writes `results.json` (settings, versions, needs by head, estimates), `table.md` and `needs.png`; `runs/` has what
    was measured, some captions or documents a file.

    Args:
        material: what is measured.
        settings: how much of it, and what it is summed up for.
        folder: where the files go; it is made if it is not there.
        progress: draw a bar on stderr.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: if the settings do not fit the model or what the folder holds.
    """
    items = measure_all(material, settings, folder / "runs", progress=progress)
    shared = shared_settings(material.model, settings)
    origin = {"versions": versions(), "commit": commit()}
    write_json(folder / "results.json", results(settings, items, shared, origin, material.tables))
    content = read_json(folder / "results.json")
    write_text(folder / "table.md", markdown(content))
    figure = needs_figure(content)
    write_atomically(folder / "needs.png", lambda path: figure.savefig(path))
    return content
