# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for sm_80 and sm_90 within the limits of the hardware; no device is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
STACK_LIMIT = 16  # bytes per thread: the assembler parks a register or two in some of the small kernels
DECODE = {"decode_kernel", "append_decode_kernel", "decode_mass_kernel"}
KERNELS = DECODE | {
    "attention_behind_kernel",
    "combine_kernel",
    "copy_kernel",
    "list_kept_kernel",
    "list_moves_kernel",
    "mean_query_logits_kernel",
    "move_kernel",
    "pool_kernel",
    "slot_write_kernel",
    "stratified_victims_kernel",
    "tokens_needed_kernel",
    "window_lse_kernel",
    "window_mass_kernel",
    "window_norms_kernel",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or platform.machine() not in ("x86_64", "aarch64"),
        reason="needs triton and its CUDA assembler",
    ),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "triton_aot_runner.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_compiles(kernels: list[dict[str, Any]], target: str) -> None:
    assert {k["kernel"] for k in kernels if k["target"] == target} == KERNELS


def test_every_configuration_of_decode_compiles(kernels: list[dict[str, Any]]) -> None:
    seen = {(k["dtype"], k["head_size"], k["group"]) for k in kernels if k["kernel"] in DECODE}
    assert {dtype for dtype, _, _ in seen} == {"bfloat16", "float16", "float32"}
    assert {(size, group) for _, size, group in seen} == {(64, 1), (64, 4), (128, 1), (128, 4)}


def test_shared_memory_fits(kernels: list[dict[str, Any]]) -> None:
    too_much = [k for k in kernels if k["shared"] > SHARED_LIMIT[k["target"]]]
    assert not too_much
    # The decode kernels stay below the 99 KB of consumer cards as well.
    assert max(k["shared"] for k in kernels if k["kernel"] in DECODE) <= 99 * 1024


def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    assert not [k for k in kernels if k["stack"] > STACK_LIMIT]
    assert max(k["registers"] for k in kernels if k["kernel"] in DECODE) <= 128  # four programs per multiprocessor


def test_decode_loads_ahead(kernels: list[dict[str, Any]]) -> None:
    """Tiles of K and V are copied to shared memory while earlier ones are used."""
    assert all(k["asynchronous_copies"] for k in kernels if k["kernel"] in DECODE)
