# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compute what the reference computes, shown in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .triton_checks import CHECKS, DTYPE_FREE

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_interpreter_runner"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_matches_reference(results: dict[str, str | None], check: str, dtype: str) -> None:
    if dtype != "float32" and check in DTYPE_FREE:
        pytest.skip("reads float32 scores only")
    error = results[f"{check}-{dtype}"]
    assert error is None, error
