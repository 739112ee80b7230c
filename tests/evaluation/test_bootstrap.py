# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.evaluation.bootstrap import estimate, paired_difference, resampling_counts

numbers = st.floats(-100, 100, allow_nan=False, width=32)
samples = st.lists(numbers, min_size=1, max_size=30)


@given(samples, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    found = estimate(values, resampling_counts(len(values), 50, seed))
    assert found is not None
    slack = 1e-9 * max(1.0, *(abs(value) for value in values))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.items == len(values)


@given(numbers, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_equal_values_give_an_interval_of_no_width(value: float, count: int) -> None:
    found = estimate([value] * count, resampling_counts(count, 50, 0))
    assert found is not None
    assert found.low == found.mean == found.high == value


@given(samples, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_run_does_not_differ_from_itself(values: list[float], seed: int) -> None:
    found = paired_difference(values, values, resampling_counts(len(values), 50, seed))
    assert found is not None
    assert (found.mean, found.low, found.high) == (0, 0, 0)


@given(samples, numbers)
@settings(max_examples=40, deadline=None)
def test_a_shift_moves_the_interval(values: list[float], shift: float) -> None:
    counts = resampling_counts(len(values), 50, 1)
    plain, moved = estimate(values, counts), estimate([value + shift for value in values], counts)
    assert plain is not None
    assert moved is not None
    assert moved.low == pytest.approx(plain.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(plain.high + shift, abs=1e-6)


def test_every_resample_draws_as_many_captions_as_there_are_and_the_seed_decides_which() -> None:
    counts = resampling_counts(12, 100, 3)
    assert counts.shape == (100, 12)
    assert (counts.sum(1) == 12).all()
    assert np.array_equal(counts, resampling_counts(12, 100, 3))
    assert not np.array_equal(counts, resampling_counts(12, 100, 4))


def test_the_width_is_that_of_a_share_and_shrinks_with_the_root_of_the_captions() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (100, 900):
        values = (rng.permutation(count) < 0.8 * count).astype(float)
        found = estimate(values, resampling_counts(count, 3000, 0))
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 100) ** 0.5, rel=0.1)
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.1)


def test_pairing_narrows_a_difference() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 200)
    other = base + rng.normal(1, 0.1, 200)
    counts = resampling_counts(200, 500, 0)
    alone, paired = estimate(base, counts), paired_difference(other, base, counts)
    assert alone is not None
    assert paired is not None
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


def test_only_the_chosen_captions_count() -> None:
    counts = resampling_counts(4, 200, 0)
    found = estimate([1, 1, 0, 0], counts, [True, True, False, False])
    assert found is not None
    assert (found.mean, found.low, found.high, found.items) == (1, 1, 1, 2)
    assert estimate([1, 1, 0, 0], counts, [False] * 4) is None


def test_sizes_must_fit() -> None:
    counts = resampling_counts(4, 10, 0)
    with pytest.raises(ValueError, match="one value for each of the 4"):
        estimate([1, 2], counts)
    with pytest.raises(ValueError, match="one flag for each of the 4"):
        estimate([1, 2, 3, 4], counts, [True])
