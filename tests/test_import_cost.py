# SPDX-License-Identifier: Apache-2.0
"""`import headkv_mm` is cheap and silent, and changes nothing of transformers but the entries it adds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

STOCK = "import torch, transformers"
LIMIT = 1.2  # times the user CPU time of the stock import
ROUNDS = 5
HEAVY = ("accelerate", "diffusers", "matplotlib", "numba", "triton", "PIL", "transformers.modeling_utils")


def run(code: str, folder: Path) -> str:
    """Runs `code` in a new interpreter, away from the repository, and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def cpu_seconds(code: str, folder: Path) -> float:
    return float(run(f"{code}; import os; print(os.times().user)", folder))


@pytest.mark.slow
def test_import_costs_at_most_a_fifth_more_than_torch_and_transformers(tmp_path: Path) -> None:
    with_us = f"{STOCK}, headkv_mm"
    run(with_us, tmp_path)  # writes the bytecode files
    times: dict[str, list[float]] = {STOCK: [], with_us: []}
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        for code, seconds in times.items():
            seconds.append(cpu_seconds(code, tmp_path))
    ratio = statistics.median(times[with_us]) / statistics.median(times[STOCK])
    assert ratio <= LIMIT, times


def test_import_prints_nothing_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
{STOCK}
import json, sys
before = set(sys.modules)
import headkv_mm
import headkv_mm as again
sys.stdout.write(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = json.loads(run(code, tmp_path))
    assert "headkv_mm" in added
    assert not [name for name in added if name.startswith(HEAVY) or name.split(".")[0] == "transformers"]


def test_attention_tables_gain_exactly_one_entry(tmp_path: Path) -> None:
    code = """
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
before = [{name: table[name] for name in table} for table in (functions, masks)]
import headkv_mm
from transformers import pipeline, AutoModelForCausalLM
for name in headkv_mm.__all__:
    getattr(headkv_mm, name)
for table, old in zip((functions, masks), before):
    assert set(table) - set(old) == {"headkv"}, set(table) ^ set(old)
    assert set(old) <= set(table)
    assert all(table[name] is old[name] for name in old)
"""
    assert run(code, tmp_path) == ""
