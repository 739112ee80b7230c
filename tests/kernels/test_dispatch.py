# SPDX-License-Identifier: Apache-2.0
"""Which backend a call goes to, and what it costs to import none."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from headkv_mm import kernels
from headkv_mm.kernels import cpu, dispatch, reference

from .triton_cases import storage
from .triton_checks import CHECKS

OPERATIONS = [name for name in kernels.__all__ if name != "backend_for"]
VARIABLE = dispatch.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures_are_the_reference_s(name: str) -> None:
    expected = inspect.signature(getattr(reference, name))
    assert inspect.signature(getattr(dispatch, name)) == expected
    assert inspect.signature(getattr(cpu, name)) == expected


def test_backend_follows_the_tensor() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert kernels.backend_for(torch.zeros(1, dtype=dtype)) == "numba"
    assert kernels.backend_for(torch.zeros(1, dtype=torch.float64)) == "reference"
    assert kernels.backend_for(torch.zeros(1, dtype=torch.int8)) == "reference"
    assert kernels.backend_for(torch.zeros(1, device="meta")) == "reference"


@pytest.mark.gpu
def test_backend_on_a_device() -> None:
    assert kernels.backend_for(torch.zeros(1, device="cuda")) == "triton"
    assert kernels.backend_for(torch.zeros(1, device="cuda", dtype=torch.float64)) == "reference"


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "numba", "triton"):
        monkeypatch.setenv(VARIABLE, name)
        assert kernels.backend_for(torch.zeros(1)) == name
    monkeypatch.setenv(VARIABLE, "")
    assert kernels.backend_for(torch.zeros(1)) == "numba"


def test_override_with_no_backend_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"cuda.*reference, numba, triton"):
        kernels.backend_for(torch.zeros(1))


def test_override_that_cannot_take_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "numba")
    with pytest.raises(ValueError, match="float64"):
        kernels.backend_for(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_call_reaches_the_chosen_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, backend)
    module: Any = {"reference": reference, "numba": cpu}[backend]
    called = []
    for name in OPERATIONS:
        if name != "head_mass":  # composed of the two below it
            original = getattr(module, name)

            def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                called.append(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, spy)
    if backend == "numba":  # the checks compare with the reference, which would call itself
        for check in CHECKS.values():
            if check.__name__ != "check_argument_errors":
                check(kernels, "cpu", torch.float32)
        assert set(called) == set(OPERATIONS) - {"head_mass"}
    else:
        s = storage([[3]], 16, torch.float32, "cpu")
        kernels.ragged_decode(s.normal(1, 1, 16), s.keys, s.values, s.start, s.length, scale=1.0)
        assert called == ["ragged_decode"]


def test_float64_goes_to_the_reference() -> None:
    s = storage([[3, 7]], 16, torch.float64, "cpu")
    query = s.normal(1, 4, 16)
    out = kernels.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=1.0)
    assert out.dtype == torch.float64
    assert torch.equal(out, reference.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=1.0))


def test_import_brings_no_compiler() -> None:
    script = "import sys, headkv_mm.kernels; print([m for m in ('numba', 'triton', 'llvmlite') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
