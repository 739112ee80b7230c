# SPDX-License-Identifier: Apache-2.0
"""Running one C function on several threads: torch's own OpenMP threads where they can be reached, else numba's.

Two thread pools in one process would fight: OpenMP threads spin for a while after their work, each pool's on the cores
that the other needs. So the first choice is the OpenMP library that torch itself is linked with. It is also safe when
several Python threads decode at once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch

from .memory import call_worker

SMALL = 1 << 15
"""Work on fewer numbers than this costs less than waking a second thread."""

Fork = Callable[[Any, int, int], None]
"""Call (worker, address of the job, number of threads): the worker once on each thread; returns when all are done."""


def thread_count(numbers: int) -> int:
    """Threads for a job that reads about this many numbers: torch's setting, one if the job is small."""
    return 1 if numbers < SMALL else torch.get_num_threads()


def _call_gomp(gomp_parallel: Any, worker: Any, job: int, threads: int) -> None:
    gomp_parallel(worker.address, job, threads, 0)


def torch_fork() -> Fork | None:
    """Fork with the OpenMP library of torch; None if torch was built without one, or with an unknown one."""
    library_directory = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # Looked up through torch, the symbol comes from the very library that torch uses. Intel's and LLVM's
            # OpenMP have this entry as well.
            gomp_parallel = ctypes.CDLL(str(library_directory / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        gomp_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        gomp_parallel.restype = None

        return functools.partial(_call_gomp, gomp_parallel)
    return None


def numba_fork() -> Fork | None:
    """Fork with numba's threads; None if only its workqueue is there, which aborts when two threads enter it."""
    if numba.config.THREADING_LAYER == "workqueue":
        return None
    if numba.config.THREADING_LAYER == "default":
        for layer, module in (("omp", "omppool"), ("tbb", "tbbpool")):
            try:
                importlib.import_module(f"numba.np.ufunc.{module}")
            except ImportError:
                continue
            numba.config.THREADING_LAYER = layer
            break
        else:
            return None

    @numba.njit(parallel=True, nogil=True)
    def on_each_thread(worker: int, job: int, threads: int) -> None:
        for _ in numba.prange(threads):
            call_worker(worker, job)

    def fork(worker: Any, job: int, threads: int) -> None:
        threads = min(threads, int(numba.config.NUMBA_NUM_THREADS))
        numba.set_num_threads(threads)
        on_each_thread(worker.address, job, threads)

    return fork


@functools.cache
def _fork() -> Fork | None:
    return torch_fork() or numba_fork()


def run(worker: Any, job: int, threads: int) -> None:
    """Run a worker (from `jit.worker`) on a job until the job is done, on up to `threads` threads."""
    fork = _fork() if threads > 1 else None
    if fork is None:
        worker.ctypes(job)
    else:
        fork(worker, job, threads)
