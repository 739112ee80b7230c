# SPDX-License-Identifier: Apache-2.0
"""What must hold for any storage, whatever backend moves the entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headkv_mm.kernels import cpu, reference

from .triton_cases import Storage, storage

BACKENDS = {"numba": cpu, "reference": reference}
SHAPES = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**16)

every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
examples = settings(max_examples=40, deadline=None)


def regions(s: Storage) -> list[slice]:
    flat = zip(s.start.flatten().tolist(), s.length.flatten().tolist())
    return [slice(begin, begin + n) for begin, n in flat]


def entries(s: Storage, slots: slice) -> set[tuple[float, ...]]:
    """Position, first key and first value number, and mass: an entry's parts must stay together."""
    columns = (s.positions[slots], s.keys[slots, 0], s.values[slots, -1], s.mass[slots])
    return set(zip(*(column.tolist() for column in columns)))


def bounds(s: Storage, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(s.start.shape)
    first = torch.randint(0, 20, shape, generator=generator).int()
    last = first + torch.randint(0, 80, shape, generator=generator).int()
    evict = torch.randint(-2, 30, shape, generator=generator).int()
    return {"first": first, "last": last, "evict": evict}


@every_backend
@given(lengths=SHAPES, seed=SEEDS, ratio=st.floats(0, 1), levels=st.sampled_from([1, 3, 1000]))
@examples
def test_victims(backend: Any, lengths: list[list[int]], seed: int, ratio: float, levels: int) -> None:
    """As many as asked for, no more than there are; never a protected one; in each stratum the lowest."""
    s = storage(lengths, 16, torch.float32, "cpu", seed=seed)
    limits = bounds(s, seed)
    scores = s.integers(0, levels, len(s.positions)).float()
    victims = backend.stratified_victims(scores, s.positions, s.start, s.length, **limits, strata_ratio=ratio)
    seen = 0
    for i, slots in enumerate(regions(s)):
        first, last, evict = (limits[name].flatten()[i] for name in ("first", "last", "evict"))
        position, chosen = s.positions[slots], victims[slots]
        candidate = (position >= first) & (position < last)
        assert not (chosen & ~candidate).any()
        assert chosen.sum() == evict.clamp(0, int(candidate.sum()))
        order = position[candidate].argsort()
        n_long = len(order) * round(ratio * 1024) // 1024
        for stratum in (order[:n_long], order[n_long:]):
            score, out = scores[slots][candidate][stratum], chosen[candidate][stratum]
            if out.any() and not out.all():
                assert score[out].max() <= score[~out].min()
        seen += int(chosen.sum())
    assert seen == victims.sum()


@every_backend
@given(lengths=SHAPES, seed=SEEDS, share=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
@examples
def test_fill_holes(backend: Any, lengths: list[list[int]], seed: int, share: float) -> None:
    """The survivors, all of them, once, packed; entries below the new length that survive do not move."""
    s = storage(lengths, 16, torch.float32, "cpu", seed=seed)
    before = s.copy()
    victims = torch.rand(len(s.positions), generator=s.generator) < share
    backend.fill_holes(victims, *s.tensors(), s.mass)
    for old, new in zip(regions(before), regions(s)):
        kept = before.copy()
        kept.positions[victims] = -1
        survivors = {entry for entry in entries(kept, old) if entry[0] >= 0}
        assert entries(s, new) == survivors
        assert new.stop - new.start == len(survivors)
        assert s.positions[new.stop : old.stop].eq(-1).all()
        in_place = ~victims[new]
        assert torch.equal(s.positions[new][in_place], before.positions[new][in_place])


@every_backend
@given(lengths=SHAPES, seed=SEEDS, masked=st.booleans(), data=st.data())
@examples
def test_gather_regions(backend: Any, lengths: list[list[int]], seed: int, masked: bool, data: st.DataObject) -> None:
    """Each new region holds the kept entries of its old one in their order; the rest of the target is untouched."""
    s = storage(lengths, 16, torch.float32, "cpu", seed=seed)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    target = storage([lengths[row] for row in rows], 16, torch.float32, "cpu", seed=seed + 1)
    untouched = torch.ones(len(target.positions), dtype=torch.bool)
    keep = torch.rand(len(s.positions), generator=s.generator) < 0.5 if masked else None
    before = target.copy()
    backend.gather_regions(torch.tensor(rows), keep, *s.tensors(), *target.tensors(), s.mass, target.mass)
    old = regions(s)
    for i, slots in enumerate(regions(target)):
        row, head = divmod(i, 2)
        source = torch.arange(old[rows[row] * 2 + head].start, old[rows[row] * 2 + head].stop)
        if keep is not None:
            source = source[keep[source]]
        for name in ("keys", "values", "positions", "mass"):
            assert torch.equal(getattr(target, name)[slots], getattr(s, name)[source])
        untouched[slots] = False
    for name in ("keys", "values", "positions", "mass"):
        got, expected = getattr(target, name)[untouched], getattr(before, name)[untouched]
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


@given(
    lengths=SHAPES,
    seed=SEEDS,
    group=st.integers(1, 4),
    window=st.integers(1, 40),
    pool=st.sampled_from([1, 3, 7, 101]),
    pooling=st.sampled_from(["max", "mean"]),
    softcap=st.sampled_from([0.0, 1.5]),
    with_sinks=st.booleans(),
    in_order=st.booleans(),
)
@examples
def test_window_scores(
    lengths: list[list[int]],
    seed: int,
    group: int,
    window: int,
    pool: int,
    pooling: str,
    softcap: float,
    with_sinks: bool,
    in_order: bool,
) -> None:
    """Compiled and plain agree; pads add nothing; pooling keeps every score between the region's extremes."""
    s = storage(lengths, 16, torch.float32, "cpu", seed=seed)
    if in_order:  # then queries skip what lies beyond them
        for slots in regions(s):
            s.positions[slots] = s.positions[slots].sort().values
    queries = s.normal(len(lengths), window, 2 * group, 16)
    query_positions = s.integers(-1, 80, len(lengths), window)
    arguments = (query_positions, s.keys, s.positions, s.start, s.length)
    sinks = s.normal(2 * group) if with_sinks else None
    options: dict[str, Any] = {"scale": 0.5, "softcap": softcap, "sinks": sinks}
    mass = reference.window_scores(queries.double(), arguments[0], s.keys.double(), *arguments[2:], **options)
    options |= {"pool": pool, "pooling": pooling}
    want = reference.window_scores(queries.double(), arguments[0], s.keys.double(), *arguments[2:], **options)
    got = cpu.window_scores(queries, *arguments, **options)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    for slots in regions(s):
        if slots.start < slots.stop:
            assert mass[slots].sum() <= 1 + 1e-9
            assert want[slots].max() <= mass[slots].max() + 1e-12
            assert want[slots].min() >= mass[slots].min() - 1e-12


@every_backend
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_slot_order_does_not_matter(backend: Any, seed: int) -> None:
    s = storage([[20, 33]], 16, torch.float32, "cpu", seed=seed)
    query = s.normal(1, 4, 16)
    out = backend.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.3)
    for slots in regions(s):
        order = torch.randperm(slots.stop - slots.start, generator=s.generator)
        s.keys[slots], s.values[slots] = s.keys[slots][order], s.values[slots][order]
    again = backend.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.3)
    torch.testing.assert_close(again, out, atol=2e-6, rtol=2e-6)


@every_backend
@given(lengths=SHAPES, seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_rows_do_not_touch_each_other(backend: Any, lengths: list[list[int]], seed: int) -> None:
    """The first row alone gives the same, to the bit, as the first row among others."""
    s = storage(lengths, 16, torch.float32, "cpu", seed=seed)
    query, new = s.normal(len(lengths), 4, 16), (s.normal(len(lengths), 2, 16), s.normal(len(lengths), 2, 16))
    positions = s.integers(100, 200, len(lengths))
    alone = s.copy()
    alone.start, alone.length = alone.start[:1].clone(), alone.length[:1].clone()
    out = backend.append_decode(query, *new, positions, *s.tensors(), scale=0.3, mass=s.mass)
    first = backend.append_decode(
        query[:1], new[0][:1], new[1][:1], positions[:1], *alone.tensors(), scale=0.3, mass=alone.mass
    )
    assert torch.equal(out[:1], first)
    for slots in regions(alone):
        assert torch.equal(s.positions[slots], alone.positions[slots])
        assert torch.equal(s.mass[slots], alone.mass[slots])
