# SPDX-License-Identifier: Apache-2.0
"""Numbers in the documents are those of the committed results, and the benchmark of a whole image works."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert script("scripts/update_docs.py").updated(text) == text, "run python scripts/update_docs.py"


def test_every_table_stands_in_a_document() -> None:
    update = script("scripts/update_docs.py")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {match[2] for page in pages for match in update.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert named == set(update.MAKERS)


@pytest.mark.slow
def test_the_benchmark_of_a_whole_image(tmp_path: Path) -> None:
    sizes = "--batch 1 --grid 6 --layers 1 --heads 2 --head-dim 16 --codebook 32 --prompt 3 --budget 1/2 --threads 1"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/image_decode.py"),
        *sizes.split(),
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    # 3 prompt tokens, 18 of 36 image tokens, room for a row of 6: exactly that, in both rows of both branches.
    assert result["bytes"]["keys_values"] == 2 * (3 + 18 + 6) * 2 * 2 * 16 * 4
    assert result["median"]["overhead_share"] > 0
