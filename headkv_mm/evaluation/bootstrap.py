# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals over captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over captions and its interval.

    Attributes:
        mean: over the captions.
        low, high: ends of the 95 % percentile interval.
        captions: how many there are.
    """

    mean: float
    low: float
    high: float
    captions: int

    def to_dict(self) -> dict[str, float | int]:
        """As JSON types."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "captions": self.captions}


def resampling_counts(captions: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """How often every caption is drawn in every resample, [resamples, captions].

    The same counts serve all methods and measures, so that paired differences are paired.
    """
    chances = np.full(captions, 1 / captions)
    return np.random.default_rng(seed).multinomial(captions, chances, size=resamples)


def estimate(
    values: npt.ArrayLike, counts: npt.NDArray[np.int64], which: npt.ArrayLike | None = None
) -> Estimate | None:
    """Mean and percentile interval of a measure.

    The interval says how far the mean would move with other captions of the same kind; it knows nothing of other
    models. Where all captions agree it has no width, which then says only that there were too few captions.

    Args:
        values: [captions], one number per caption.
        counts: from `resampling_counts`.
        which: [captions] bool, the captions that count; all by default. A resample that holds none of them is left out.

    Returns:
        The estimate, or None if no caption counts.

    Raises:
        ValueError: if the sizes do not fit.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (counts.shape[1],):
        raise ValueError(f"expected one value for each of the {counts.shape[1]} captions, got shape {numbers.shape}")
    chosen = np.ones(len(numbers), dtype=bool) if which is None else np.asarray(which, dtype=bool)
    if chosen.shape != numbers.shape:
        raise ValueError(f"expected one flag for each of the {len(numbers)} captions, got shape {chosen.shape}")
    if not chosen.any():
        return None
    weights = counts[:, chosen]
    drawn = weights.sum(1)
    # The centre is taken off first: then equal values give exactly that value, whatever the sums round to.
    centre = numbers[chosen].mean()
    means = centre + (weights @ (numbers[chosen] - centre))[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(means) else (centre, centre)
    return Estimate(float(centre), float(low), float(high), int(chosen.sum()))


def paired_difference(
    values: npt.ArrayLike, reference: npt.ArrayLike, counts: npt.NDArray[np.int64], which: Any = None
) -> Estimate | None:
    """`values - reference`, caption by caption, as `estimate` does it."""
    return estimate(np.asarray(values, np.float64) - np.asarray(reference, np.float64), counts, which)
