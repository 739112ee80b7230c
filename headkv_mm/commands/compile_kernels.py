# SPDX-License-Identifier: Apache-2.0
"""Compiling the CPU kernels before they are needed, with a word to whoever waits."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PATIENCE = 2.0  # seconds before the user is told what takes so long


def compile_cpu_kernels(dtypes: Iterable[torch.dtype]) -> float:
    """Compile the CPU kernels for these dtypes if they will be used; they are kept on disk for the next time.

    Returns:
        Seconds it took.
    """
    import torch

    from headkv_mm.kernels import dispatch

    began = time.perf_counter()
    wanted = [dtype for dtype in dtypes if dispatch.backend_for(torch.zeros(1, dtype=dtype)) == "numba"]
    if wanted:
        from headkv_mm.kernels import cpu

        notice = threading.Timer(_PATIENCE, _tell)
        notice.daemon = True
        notice.start()
        try:
            cpu.warm_up(dtypes=wanted)
        finally:
            notice.cancel()
    return time.perf_counter() - began


def _tell() -> None:
    print("compiling the CPU kernels, once; this may take a minute or two ...", file=sys.stderr, flush=True)
