# SPDX-License-Identifier: Apache-2.0
"""Attention of the query heads of one region over its slots: the inner loops of the decode kernels.

A region's keys are read once, in order, then its values: memory sees two sequential streams. Four slots are taken
together so that a dot product's horizontal sum and an accumulator's load and store are paid once per four.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import widen
from .jit import jit
from .softmax import soft_cap, softmax_weights


@jit
def dot(query: Any, keys: Any, slot: int) -> Any:
    """float32 dot product of query [D] with one stored key."""
    total = np.float32(0.0)
    for d in range(query.size):
        total += query[d] * widen(keys[slot, d])
    return total


@jit
def group_logits(query: Any, keys: Any, begin: Any, count: Any, scale: Any, logits: Any) -> None:
    """logits[r, j] = scale * query[r] . keys[begin + j], for query [R, D] and logits [R, at least count]."""
    group, size = query.shape
    zero = np.float32(0.0)
    fours = count - count % 4
    for j in range(0, fours, 4):
        s = begin + j
        for r in range(group):
            a, b, c, e = zero, zero, zero, zero
            for d in range(size):
                q = query[r, d]
                a += q * widen(keys[s, d])
                b += q * widen(keys[s + 1, d])
                c += q * widen(keys[s + 2, d])
                e += q * widen(keys[s + 3, d])
            logits[r, j] = a * scale
            logits[r, j + 1] = b * scale
            logits[r, j + 2] = c * scale
            logits[r, j + 3] = e * scale
    for j in range(fours, count):
        for r in range(group):
            logits[r, j] = dot(query[r], keys, begin + j) * scale


@jit
def weighted_values(weights: Any, values: Any, begin: Any, count: Any, out: Any) -> None:
    """out[r] = sum over j of weights[r, j] * values[begin + j], for weights [R, at least count] and out [R, D]."""
    group, size = out.shape
    out[:] = np.float32(0.0)
    fours = count - count % 4
    for j in range(0, fours, 4):
        s = begin + j
        for r in range(group):
            a, b, c, e = weights[r, j], weights[r, j + 1], weights[r, j + 2], weights[r, j + 3]
            for d in range(size):
                out[r, d] += (
                    a * widen(values[s, d])
                    + b * widen(values[s + 1, d])
                    + c * widen(values[s + 2, d])
                    + e * widen(values[s + 3, d])
                )
    for j in range(fours, count):
        for r in range(group):
            a = weights[r, j]
            for d in range(size):
                out[r, d] += a * widen(values[begin + j, d])


@jit
def attend(
    query: Any,
    keys: Any,
    values: Any,
    begin: Any,
    count: Any,
    scale: Any,
    softcap: Any,
    sinks: Any,
    mass: Any,
    logits: Any,
    out: Any,
) -> None:
    """One region's attention.

    Args:
        query: [R, D] float32.
        keys, values: [N, D]; the region is begin .. begin + count.
        softcap: 0 for none.
        sinks: [R] float32, or empty for none.
        mass: [N] float32, added to; or empty for none.
        logits: [R, at least count] float32 scratch.
        out: [R, D] float32.
    """
    if count == 0:
        out[:] = np.float32(0.0)
        return
    group_logits(query, keys, begin, count, scale, logits)
    for r in range(query.shape[0]):
        row = logits[r, :count]
        if softcap > 0:
            soft_cap(row, softcap)
        has_sink = sinks.size > 0
        total = softmax_weights(row, sinks[r] if has_sink else np.float32(0.0), has_sink)
        share = np.float32(1.0) / total
        for j in range(count):
            row[j] *= share
        if mass.size > 0:
            for j in range(count):
                mass[begin + j] += row[j]
    weighted_values(logits, values, begin, count, out)
