# SPDX-License-Identifier: Apache-2.0
"""Attention of the query heads of one region over its slots: the inner loops of the decode kernels.

A region's keys are read once, in order, then its values: memory sees two sequential streams. Four slots are taken
together so that a dot product's horizontal sum and an accumulator's load and store are paid once per four.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .bits import exp_of_nonpositive, widen
from .jit import jit
from .softmax import exp_below, largest, soft_cap


@jit
def dot(query: Any, keys: Any, slot: int) -> Any:
    """float32 dot product of query [D] with one stored key."""
    total = np.float32(0.0)
    for d in range(query.size):
        total += query[d] * widen(keys[slot, d])
    return total


@jit
def group_logits(query: Any, keys: Any, begin: Any, count: Any, scale: Any, logits: Any) -> None:
    """logits[r, j] = scale * query[r] . keys[begin + j], for query [R, D] and logits [R, at least count].

    Two queries at a time, so that a key is widened once for both.
    """
    group, size = query.shape
    zero = np.float32(0.0)
    fours, twos = count - count % 4, group - group % 2
    for j in range(0, fours, 4):
        s = begin + j
        for r in range(0, twos, 2):
            a, b, c, e = zero, zero, zero, zero
            f, g, h, i = zero, zero, zero, zero
            for d in range(size):
                p, q = query[r, d], query[r + 1, d]
                k, m, n, o = widen(keys[s, d]), widen(keys[s + 1, d]), widen(keys[s + 2, d]), widen(keys[s + 3, d])
                a += p * k
                b += p * m
                c += p * n
                e += p * o
                f += q * k
                g += q * m
                h += q * n
                i += q * o
            logits[r, j] = a * scale
            logits[r, j + 1] = b * scale
            logits[r, j + 2] = c * scale
            logits[r, j + 3] = e * scale
            logits[r + 1, j] = f * scale
            logits[r + 1, j + 1] = g * scale
            logits[r + 1, j + 2] = h * scale
            logits[r + 1, j + 3] = i * scale
        for r in range(twos, group):
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
def attend_part(
    query: Any,
    keys: Any,
    values: Any,
    begin: Any,
    count: Any,
    scale: Any,
    softcap: Any,
    weights: Any,
    peaks: Any,
    totals: Any,
    out: Any,
    squares: Any,
) -> None:
    """Attention over a part of a region, or all of it, for `merge_parts`.

    Args:
        query: [R, D] float32.
        keys, values: [N, D]; the part is begin .. begin + count, and not empty.
        weights: [R, at least count] float32, becomes exp(logit - peak).
        peaks, totals: [R] float32, become the largest logit and the sum of the weights.
        out: [R, D] float32, becomes the weighted sum of the values.
        squares: [count] float32, gets the squares of the logits before any softcap added; or empty for none.
    """
    group_logits(query, keys, begin, count, scale, weights)
    for r in range(query.shape[0]):
        row = weights[r, :count]
        for j in range(squares.size):
            squares[j] += row[j] * row[j]
        if softcap > 0:
            soft_cap(row, softcap)
        peaks[r] = largest(row, np.float32(-np.inf))
        totals[r] = exp_below(row, peaks[r])
    weighted_values(weights, values, begin, count, out)


@jit
def merge_parts(peaks: Any, totals: Any, parts: Any, sinks: Any, out: Any) -> None:
    """One region's attention from that of its parts, added up in their order.

    Args:
        peaks: [P, R] float32, becomes the factor that makes each part's weights those of the whole region.
        totals: [P, R] float32.
        parts: [P, R, D] float32.
        sinks: [R] float32, or empty for none.
        out: [R, D] float32.
    """
    out[:] = np.float32(0.0)
    for r in range(out.shape[0]):
        most = sinks[r] if sinks.size > 0 else np.float32(-np.inf)
        for p in range(peaks.shape[0]):
            most = max(most, peaks[p, r])
        total = exp_of_nonpositive(sinks[r] - most) if sinks.size > 0 else np.float32(0.0)
        for p in range(peaks.shape[0]):
            peaks[p, r] = exp_of_nonpositive(peaks[p, r] - most)
            total += peaks[p, r] * totals[p, r]
        for p in range(peaks.shape[0]):
            factor = peaks[p, r] / total
            peaks[p, r] = factor
            for d in range(out.shape[1]):
                out[r, d] += factor * parts[p, r, d]


@jit
def weights_of_part(weights: Any, begin: Any, count: Any, group: Any) -> Any:
    """The place [R, count] of a part's weights among those of all slots, [N * R]."""
    return weights[begin * group : (begin + count) * group].reshape((group, count))


@jit
def add_mass(weights: Any, factors: Any, mass: Any) -> None:
    """Add the attention of a part to its slots' running mass.

    Args:
        weights: [R, at least n] float32, from `attend_part`.
        factors: [R] float32, from `merge_parts`.
        mass: [n] float32.
    """
    for r in range(factors.size):
        row, factor = weights[r], factors[r]
        for j in range(mass.size):
            mass[j] += row[j] * factor
