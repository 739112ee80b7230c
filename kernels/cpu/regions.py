# SPDX-License-Identifier: Apache-2.0
"""How the regions of a cache are shared among threads, and the softmax that all kernels use."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import exp_of_nonpositive
from .jit import jit


@jit
def longest(length: Any) -> int:
    """The largest of the lengths, 0 if there are none."""
    most = 0
    for i in range(length.size):
        most = max(most, length[i])
    return most


@jit
def work_order(length: Any) -> Any:
    """Regions longer than the mean first, then the others: threads that take the next one finish together.

    Returns:
        int32, the region numbers in the order in which they should be taken.
    """
    count = length.size
    total = 0
    for i in range(count):
        total += length[i]
    order = np.empty(count, np.int32)
    filled = 0
    for long in (True, False):
        for i in range(count):
            if (np.int64(length[i]) * count > total) == long:
                order[filled] = i
                filled += 1
    return order


@jit
def softmax_weights(logits: Any, sink: Any, has_sink: bool) -> Any:
    """Replace logits by exp(logit - max), in place; returns the sum, with the sink's share in it.

    All logits -inf (and no sink): weights and sum become 0.
    """
    most = sink if has_sink else np.float32(-np.inf)
    for j in range(logits.size):
        most = max(most, logits[j])
    if most == np.float32(-np.inf):
        for j in range(logits.size):
            logits[j] = np.float32(0.0)
        return np.float32(0.0)
    total = exp_of_nonpositive(sink - most) if has_sink else np.float32(0.0)
    for j in range(logits.size):
        weight = exp_of_nonpositive(logits[j] - most)
        logits[j] = weight
        total += weight
    return total
