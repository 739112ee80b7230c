# SPDX-License-Identifier: Apache-2.0
"""How a decode step is cut into tasks: one per short region, several per long one, so that threads finish together.

Where a region is cut depends on its own length alone. So a result is the same to the bit on any number of threads, and
whatever other regions there are.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .jit import jit

PART = 512
"""Most slots of one task: enough to be worth starting two streams from memory, few enough to share out evenly."""

REGION, BEGIN, COUNT, FIRST_TASK, PARTS = range(5)
"""Columns of the table of tasks: the region, its slots `BEGIN .. BEGIN + COUNT`, and the tasks it is cut into."""
COLUMNS = 5


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


_SCRATCH = _Scratch()


def scratch(size: int) -> Tensor:
    """At least `size` bytes for the current Python thread, until its next call: allocating anew costs microseconds."""
    if _SCRATCH.bytes.numel() < size:
        _SCRATCH.bytes = torch.empty(size, dtype=torch.uint8)
    return _SCRATCH.bytes


def most_tasks(regions: int, slots: int) -> int:
    """A bound of the number of tasks that is known without reading the lengths."""
    return regions + slots // PART


@jit
def lay_out(start: Any, length: Any, tasks: Any) -> Any:
    """Fill the table, the parts of long regions first, so that no thread starts one last.

    Args:
        start, length: [regions] int32. An empty region gets a task, which writes its zeros.
        tasks: [most_tasks, COLUMNS] int64.

    Returns:
        The number of tasks, and the most slots of any.
    """
    # Regions that overlap, against the contract, must not write past the table: they get fewer and longer parts.
    made, largest, spare = 0, 0, tasks.shape[0] - start.size
    for is_long in (True, False):
        for region in range(start.size):
            count = np.int64(length[region])
            if (count > PART) == is_long:
                parts = min(max((count + PART - 1) // PART, 1), spare + 1)
                size = max(((count + parts - 1) // parts + 3) // 4 * 4, 4)  # the loops take four slots together
                parts = max((count + size - 1) // size, 1)
                spare -= parts - 1
                first = made
                for part in range(parts):
                    tasks[made, REGION] = region
                    tasks[made, BEGIN] = np.int64(start[region]) + part * size
                    tasks[made, COUNT] = min(size, count - part * size)
                    tasks[made, FIRST_TASK] = first
                    tasks[made, PARTS] = parts
                    largest = max(largest, tasks[made, COUNT])
                    made += 1
    return made, largest
