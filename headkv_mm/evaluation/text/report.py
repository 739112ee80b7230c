# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation of text: run, sum up, write the files that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkv_mm import plots
from headkv_mm.evaluation.origin import commit, versions
from headkv_mm.evaluation.storage import read_json, write_atomically, write_json, write_text
from headkv_mm.evaluation.text.plots import depth_by_length
from headkv_mm.evaluation.text.runner import TextRunner
from headkv_mm.evaluation.text.settings import TextSettings
from headkv_mm.evaluation.text.summary import depth_tables, plot_records, results
from headkv_mm.evaluation.text.tables import markdown

DEPTH_TASK = "single"


def evaluate_text(
    model: Any, tokenizer: Any, settings: TextSettings, folder: Path, *, progress: bool = True
) -> dict[str, Any]:
    """Evaluate a language model; what `folder` has already is not run again.

    Writes `results.json` (settings, versions, every document's outcome, estimates), `table.md`, `quality_vs_bytes.png`
    and, if the task "single" is among those run, `depth_by_length.png`; `runs/` has a file per method and budget.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        settings: what to run.
        folder: where the files go; it is made if it is not there.
        progress: draw a bar on stderr.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: if the settings do not fit the model or what the folder holds.
    """
    runs = TextRunner(model, tokenizer, settings, folder / "runs", progress=progress).run()
    write_json(folder / "results.json", results(settings, runs, {"versions": versions(), "commit": commit()}))
    content = read_json(folder / "results.json")
    write_text(folder / "table.md", markdown(content))
    known = "known" if settings.query_aware else "not known"
    figure = plots.quality_vs_bytes(
        plot_records(content),
        quality_name="Share of documents answered right",
        title=f"Quality against bytes, question {known} when compressed",
    )
    write_atomically(folder / "quality_vs_bytes.png", lambda path: figure.savefig(path))
    tables = depth_tables(content, DEPTH_TASK)
    if tables:
        map_ = depth_by_length(tables, "One needle, found by depth and length (% of documents, mean over the budgets)")
        write_atomically(folder / "depth_by_length.png", lambda path: map_.savefig(path))
    return content
