# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals over items: captions of images, or documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over items and its interval.

    Attributes:
        mean: over the items.
        low, high: ends of the 95 % percentile interval.
        items: how many there are.
    """

    mean: float
    low: float
    high: float
    items: int

    def to_dict(self, items: str) -> dict[str, float | int]:
        """As JSON types; `items` says what they are, such as "captions"."""
        return {"mean": self.mean, "low": self.low, "high": self.high, items: self.items}


def resampling_counts(items: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """How often every item is drawn in every resample, [resamples, items].

    The same counts serve all methods and measures, so that paired differences are paired.
    """
    chances = np.full(items, 1 / items)
    return np.random.default_rng(seed).multinomial(items, chances, size=resamples)


def estimate(
    values: npt.ArrayLike, counts: npt.NDArray[np.int64], which: npt.ArrayLike | None = None
) -> Estimate | None:
    """Mean and percentile interval of a measure.

    The interval says how far the mean would move with other items of the same kind; it knows nothing of other
    models. Where all items agree it has no width, which then says only that there were too few of them.

    Args:
        values: [items], one number each.
        counts: from `resampling_counts`.
        which: [items] bool, those that count; all by default. A resample that holds none of them is left out.

    Returns:
        The estimate, or None if no item counts.

    Raises:
        ValueError: if the sizes do not fit.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (counts.shape[1],):
        raise ValueError(f"expected one value for each of the {counts.shape[1]} items, got shape {numbers.shape}")
    chosen = np.ones(len(numbers), dtype=bool) if which is None else np.asarray(which, dtype=bool)
    if chosen.shape != numbers.shape:
        raise ValueError(f"expected one flag for each of the {len(numbers)} items, got shape {chosen.shape}")
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
    """`values - reference`, item by item, as `estimate` does it."""
    return estimate(np.asarray(values, np.float64) - np.asarray(reference, np.float64), counts, which)
