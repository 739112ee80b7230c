# SPDX-License-Identifier: Apache-2.0
"""The numerator of a softmax over one row of logits, and soft-capping before it, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import exp_of_nonpositive
from .jit import jit


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


@jit
def soft_cap(logits: Any, softcap: Any) -> None:
    """Replace logits by softcap * tanh(logit / softcap), in place.

    tanh from exp of a negative number: never overflows, and a loop without library calls uses vector registers.
    """
    one, minus_two = np.float32(1.0), np.float32(-2.0)
    for j in range(logits.size):
        x = logits[j] / softcap
        t = exp_of_nonpositive(minus_two * abs(x))
        tanh = (one - t) / (one + t)
        logits[j] = softcap * (-tanh if x < 0 else tanh)
