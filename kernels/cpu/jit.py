# SPDX-License-Identifier: Apache-2.0
"""`numba.njit` with this package's flags, typed once so that the kernels stay typed.

numba keeps compiled code beside the sources. It notices a changed kernel file, but not a changed file that a kernel
imports from: after editing `attend.py`, `bits.py`, `job.py` or `memory.py`, delete `__pycache__` here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba  # type: ignore[import-untyped]

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered (this is what lets a dot product use vector registers), but infinities and NaN keep their
# meaning: masked logits are -inf, and a NaN in the cache must be seen in the output.
_REORDER = {"reassoc", "contract", "nsz"}
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def jit(function: F) -> F:
    """Compile; sums may be reordered."""
    compiled: F = numba.njit(function, fastmath=_REORDER, **_OPTIONS)
    return compiled


def exact_jit(function: F) -> F:
    """Compile; every operation as written."""
    compiled: F = numba.njit(function, **_OPTIONS)
    return compiled


def worker(function: Callable[[Any], None]) -> Any:
    """Compile `function(address)` now, as a C function `void f(intptr_t)` that any thread can call."""
    return numba.cfunc(numba.types.void(numba.types.intp), nopython=True, cache=True)(function)
