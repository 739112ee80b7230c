#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Put the committed results into README.md and docs/: everything between `<!-- results: NAME -->` and `<!-- end -->`.

Example:
    python scripts/update_docs.py          # rewrite
    python scripts/update_docs.py --check  # exit with 1 if a document is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file from elsewhere

import allocation_tables
import cpu_tables
import depth_tables
import head_need_tables
import method_tables
import plan_tables
import text_tables

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- results: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


MAKERS: dict[str, Callable[[], str]] = {
    "image-throughput": cpu_tables.image_throughput,
    "published": plan_tables.published,
    "plan-images": plan_tables.plan_images,
    "plan-texts": plan_tables.plan_texts,
    "plan-glm-image": plan_tables.plan_glm_image,
    "plan-list": plan_tables.plan_list,
    "heads": method_tables.head_table,
    "layer-errors": method_tables.layer_errors,
    "images-methods": method_tables.images_methods,
    "method-rows": method_tables.method_rows,
    "segments": method_tables.segments,
    "compiled-tables": method_tables.compiled_tables,
    "head-needs": head_need_tables.needs,
    "head-predictors-images": head_need_tables.predictors_of_images,
    "head-predictors-text": head_need_tables.predictors_of_texts,
    "head-mass-and-answers": head_need_tables.mass_and_answers,
    "head-depth": depth_tables.depth,
    "head-depth-labels": depth_tables.labels,
    "head-rankings-images": head_need_tables.rankings_of_images,
    "head-rankings-text": head_need_tables.rankings_of_texts,
    "allocation-forms-images": allocation_tables.forms_of_images,
    "allocation-forms-text": allocation_tables.forms_of_texts,
    "allocation-held-out-images": allocation_tables.held_out_images,
    "allocation-held-out-text": allocation_tables.held_out_texts,
    "held-out-deep": allocation_tables.held_out_deep,
    "held-out-images-short": allocation_tables.held_out_images_short,
    "held-out-text-short": allocation_tables.held_out_texts_short,
    "images": method_tables.images,
    "text-cache": cpu_tables.text_cache,
    "fastkv-prefill": cpu_tables.fastkv_prefill,
    "decode": cpu_tables.decode,
    "decode-long": cpu_tables.decode_long,
    "window-scores": cpu_tables.window_scores,
    "image-decode": cpu_tables.image_decode,
    "text": text_tables.text,
    "text-query-aware": text_tables.text_query_aware,
    "text-mixed": text_tables.text_mixed,
    "text-short": text_tables.text_short,
    "text-tasks": text_tables.text_tasks,
}


def updated(text: str) -> str:
    """The document with every block made anew.

    Raises:
        KeyError: for a block whose results nobody makes.
    """
    return BLOCK.sub(lambda match: f"{match[1]}{MAKERS[match[2]]()}\n{match[4]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check every document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    args = parser.parse_args(arguments)
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if args.check else 'updated'}: {', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
