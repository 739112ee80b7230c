# SPDX-License-Identifier: Apache-2.0
"""accelerate's processes: who they are, and how all of them learn what one of them found.

The main process speaks for all: after an error it alone prints and gives the exit code. A launcher ends every process
as soon as one reports a failure, so the others leave without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_ERRORS = (ValueError, TypeError, OSError, ImportError)
_LONGEST = timedelta(days=30)
"""A process that is done waits for the others; the launcher ends all of them when one dies."""


def start_processes(device: str | None = None) -> Any:
    """The process this is, and the others of its launch.

    Args:
        device: what the user asked for; by default an accelerator if there is one.

    Returns:
        accelerate's `PartialState`.

    Raises:
        ValueError: if a machine has fewer accelerators than processes, or accelerate does not see the others.
    """
    import torch
    from accelerate import PartialState

    launched, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    kind = None if device is None else device.partition(":")[0]
    on_cpu = kind == "cpu" if kind is not None else not torch.accelerator.is_available()
    if not on_cpu and launched > 1 and local > torch.accelerator.device_count():
        raise ValueError(
            f"{local} processes on a machine with {torch.accelerator.device_count()} accelerators: start one for each, "
            "or use --device cpu"
        )
    state = PartialState(cpu=on_cpu, timeout=_LONGEST) if launched > 1 else PartialState(cpu=on_cpu)
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were started, but accelerate takes them for {state.num_processes}: "
            "use --device cpu, or start one process"
        )
    if launched > 1 and kind not in (None, state.device.type):
        raise ValueError(f"--device {device}: these processes run on {state.device.type}; leave --device out")
    return state


def from_main(state: Any, function: Callable[[], T]) -> T:
    """Let the main process do something and tell everybody the result.

    Raises:
        ValueError, TypeError, OSError, ImportError: on the main process, if the function does.
        SystemExit: on the others, without a word, in that case.
    """
    from accelerate.utils import gather_object

    result: T | None = None
    error: Exception | None = None
    if state.is_main_process:
        try:
            result = function()
        except _ERRORS as found:
            error = found
    shared = gather_object([(result, error is None)])[0]  # in the order of the ranks
    if error is not None:
        raise error
    if not shared[1]:
        raise SystemExit(0)
    value: T = shared[0]
    return value


def everywhere(state: Any, function: Callable[[], T]) -> T:
    """Let every process do something; if it goes wrong on one, all of them stop.

    Raises:
        ValueError, TypeError, OSError, ImportError: on the main process, its own or the first other's error.
        SystemExit: on the others, without a word, in that case.
    """
    from accelerate.utils import gather_object

    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except _ERRORS as found:
        error = found
    said = gather_object([None if error is None else str(error) or type(error).__name__])
    first = next((index for index, text in enumerate(said) if text is not None), None)
    if first is None:
        return result  # type: ignore[return-value]  # the function's own
    if not state.is_main_process:
        raise SystemExit(0)
    if error is not None:
        raise error
    raise ValueError(f"process {first}: {said[first]}")
