# SPDX-License-Identifier: Apache-2.0
"""The numerator of a softmax over one row of logits, and soft-capping before it, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import as_ordered, exp_of_nonpositive, from_ordered
from .jit import jit


@jit
def largest(logits: Any, at_least: Any) -> Any:
    """The largest of the logits and `at_least`; NaN if a positive NaN is among them, else NaN are passed over."""
    most = as_ordered(at_least)
    for j in range(logits.size):
        most = max(most, as_ordered(logits[j]))
    return from_ordered(most)


@jit
def exp_below(logits: Any, most: Any) -> Any:
    """Replace logits by exp(logit - most), in place, and return their sum. `most` is their maximum or more.

    If it is -inf, so are all logits, or they are NaN: weights become 0 and the sum 0 or NaN.
    """
    total = np.float32(0.0)
    if most == np.float32(-np.inf):
        for j in range(logits.size):
            if logits[j] != logits[j]:
                total = np.float32(np.nan)
            logits[j] = np.float32(0.0)
        return total
    for j in range(logits.size):
        weight = exp_of_nonpositive(logits[j] - most)
        logits[j] = weight
        total += weight
    return total


@jit
def softmax_weights(logits: Any, sink: Any, has_sink: bool) -> Any:
    """Replace logits by exp(logit - max), in place; returns the sum, with the sink's share in it.

    All logits -inf (and no sink): weights and sum become 0.
    """
    most = largest(logits, sink if has_sink else np.float32(-np.inf))
    total = exp_below(logits, most)
    if has_sink and most > np.float32(-np.inf):
        total += exp_of_nonpositive(sink - most)
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
