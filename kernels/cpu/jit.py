# SPDX-License-Identifier: Apache-2.0
"""`numba.njit` and `numba.cfunc` with this package's flags, typed once so that the kernels stay typed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

SOURCES = 1 + zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
"""Changes with any source file here; never zero."""

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be reordered (this is what lets a dot product use vector registers), but infinities and NaN keep their
# meaning: masked logits are -inf, and a NaN in the cache must be seen in the output.
_REORDER = {"reassoc", "contract", "nsz"}
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def jit(function: F) -> F:
    """Compile; sums may be reordered."""
    compiled: F = numba.njit(function, fastmath=_REORDER, **_OPTIONS)
    return compiled


def exact_jit(function: F) -> F:
    """Compile; every operation as written."""
    compiled: F = numba.njit(function, **_OPTIONS)
    return compiled


def worker(function: Callable[[Any], None]) -> Any:
    """Compile `function(address)` now, as a C function `void f(intptr_t)` for any thread, and cache it on disk.

    numba recompiles a cached function when its own file changes or a variable that it closes over, but not when a file
    that it imports from does. So every worker closes over `SOURCES`.
    """
    return numba.cfunc(numba.types.void(numba.types.intp), nopython=True, cache=True)(function)
