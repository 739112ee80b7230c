#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make every figure and table of docs/head_types.md anew from the committed results; no model runs.

Example:
    python scripts/head_type_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file from elsewhere

import update_docs
from allocation_curves import curves_figure
from allocation_tables import EXPLORATION
from kept_token_plots import draw_all
from result_files import RESULTS, load

from headkv_mm.evaluation.storage import write_atomically
from headkv_mm.plots_head_needs import needs_figure

TITLES = {
    "images": "Images that are all right, against bytes, by form",
    "text": "Documents answered right, against bytes, by form",
}


def draw_figures(results: Path) -> list[Path]:
    """Draw what the page shows, beside the results that it is drawn from.

    Args:
        results: folder of the committed results.

    Returns:
        The files.
    """
    drawn = []
    for folder in ("heads_images", "heads_text", "heads_images_deep"):
        drawn.append(results / folder / "needs.png")
        write_atomically(drawn[-1], needs_figure(load(f"{folder}/results.json")).savefig)
    exploration = load(EXPLORATION)
    for kind, title in TITLES.items():
        drawn.append((results / EXPLORATION).parent / f"curves_{kind}.png")
        write_atomically(drawn[-1], curves_figure(exploration[kind], title).savefig)
    folder_of_maps = results / "kept_tokens"
    return [*drawn, *draw_all(load("kept_tokens/results.json"), folder_of_maps)]


def main() -> int:
    """Draw the figures, then fill in the tables of all documents."""
    for path in draw_figures(RESULTS):
        print(path.relative_to(RESULTS.parents[1]))
    return update_docs.main([])


if __name__ == "__main__":
    sys.exit(main())
