# SPDX-License-Identifier: Apache-2.0
"""How many threads a kernel may use: torch's own setting, as far as numba's threading layer is safe."""

from __future__ import annotations

import functools
import importlib
import threading

import numba  # type: ignore[import-untyped]
import torch

SMALL = 1 << 15
"""Work on fewer numbers than this costs less than waking a second thread."""

_of_this_thread = threading.local()


@functools.cache
def _choose_layer() -> bool:
    """Prefer OpenMP, then TBB. numba's third layer, workqueue, aborts when two Python threads enter it at once."""
    if numba.config.THREADING_LAYER != "default":
        return str(numba.config.THREADING_LAYER) != "workqueue"
    for layer, module in (("omp", "omppool"), ("tbb", "tbbpool")):
        try:
            importlib.import_module(f"numba.np.ufunc.{module}")
        except ImportError:
            continue
        numba.config.THREADING_LAYER = layer
        return True
    return False


def thread_count(numbers: int) -> int:
    """Threads for a kernel that reads about this many numbers; also tells numba, for the calling thread."""
    if numbers < SMALL:
        return 1
    count = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))
    if count == 1 or not _choose_layer():
        return 1
    if getattr(_of_this_thread, "count", 0) != count:
        numba.set_num_threads(count)
        _of_this_thread.count = count
    return count
