# SPDX-License-Identifier: Apache-2.0
"""Checks of the Triton launchers against the float64 reference, for the interpreter and for a device.

A check takes the backend module, a device and a dtype, and raises AssertionError. Everything outside the regions is NaN
(or -7 for positions), so a kernel that reads too far shows, and storage is compared in full, so one that writes too far
shows as well. This module imports no triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headkv_mm.kernels import reference
from headkv_mm.kernels.mass_kinds import MassOf

from .behind_checks import check_attention_behind
from .triton_cases import OUTPUT_TOLERANCE, WEIGHT_TOLERANCE, Storage, block, close, same, storage


def decode_case(
    backend: Any,
    s: Storage,
    group: int,
    *,
    append: bool,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
    mass: bool = False,
    mass_of: MassOf = "attention",
) -> None:
    batch, groups = s.start.shape
    size = s.keys.shape[1]
    query = s.normal(batch, groups * group, size)
    options: dict[str, Any] = {"scale": 1.5 / size**0.5, "max_length": max_length, "softcap": softcap}
    options["mass_of"] = mass_of
    if sinks:
        options["sinks"] = s.normal(groups * group, dtype=torch.float32)
    expected, wide = s.copy(), s.copy(torch.float64)
    new = [s.normal(batch, groups, size), s.normal(batch, groups, size), s.integers(5000, 9000, batch)]
    if append:
        # The exact storage for the comparison of slots, the wide one for that of outputs.
        reference.slot_write(*new, *expected.tensors(), expected.mass if mass else None)
        want = reference.append_decode(
            query.double(),
            new[0].double(),
            new[1].double(),
            new[2],
            *wide.tensors(),
            **options,
            mass=wide.mass if mass else None,
        )
        got = backend.append_decode(query, *new, *s.tensors(), **options, mass=s.mass if mass else None)
    else:
        arguments = (wide.keys, wide.values, wide.start, wide.length)
        want = reference.ragged_decode(query.double(), *arguments, **options, mass=wide.mass if mass else None)
        arguments = (s.keys, s.values, s.start, s.length)
        got = backend.ragged_decode(query, *arguments, **options, mass=s.mass if mass else None)
    assert got.dtype == query.dtype
    close(got, want, OUTPUT_TOLERANCE[query.dtype])
    close(s.mass, wide.mass, WEIGHT_TOLERANCE)
    expected.mass, s.mass = s.mass, s.mass
    same(s, expected)


def check_decode_one_program(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Lengths around a tile; every option on its own, then together; a head size that is no power of two."""
    n = block(64, dtype)
    s = storage([[0, 1], [n - 1, n], [n + 1, 2 * n + 3]], 64, dtype, device)
    decode_case(backend, s, 1, append=False, max_length=1024)
    s = storage([[0, 1], [40, 70]], 80, dtype, device, seed=1)
    decode_case(backend, s, 3, append=False, max_length=70, softcap=2.0)
    decode_case(backend, s, 3, append=False, sinks=True)
    decode_case(backend, s, 4, append=False, softcap=3.0, sinks=True, mass=True)


def check_decode_split(backend: Any, device: str, dtype: torch.dtype) -> None:
    """More than one chunk: lengths around a chunk, and one giant among empties."""
    s = storage([[1023, 1024, 1025, 0]], 16, dtype, device)
    decode_case(backend, s, 2, append=False, max_length=3000, mass=True)
    s = storage([[0, 0], [0, 2300], [0, 1]], 16, dtype, device, seed=1)
    decode_case(backend, s, 1, append=False, softcap=2.0, sinks=True, mass=True)


def check_decode_nothing(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Empty regions give zeros, with and without a launch, with and without a sink."""
    for max_length in (0, 5, 2000, None):
        for sinks in (False, True):
            s = storage([[0, 0]], 16, dtype, device)
            decode_case(backend, s, 2, append=False, max_length=max_length, sinks=sinks, mass=True)


def check_append_decode(backend: Any, device: str, dtype: torch.dtype) -> None:
    """The fused kernel on both sides of a tile, then the split way; the new entry is in the result and in the slots."""
    n = block(64, dtype)
    s = storage([[0, 1, n - 1], [n, n + 1, 20]], 64, dtype, device)
    decode_case(backend, s, 4, append=True, max_length=1024, mass=True)
    decode_case(backend, s, 4, append=True, softcap=2.0, sinks=True, mass=True)
    s = storage([[0, 1], [10, 33]], 80, dtype, device, seed=1)
    decode_case(backend, s, 1, append=True, sinks=True)
    s = storage([[1023, 1024], [0, 7]], 16, dtype, device, seed=2)
    decode_case(backend, s, 2, append=True, sinks=True, mass=True)


def check_squared_logits(backend: Any, device: str, dtype: torch.dtype) -> None:
    """One program and several, fused and not; around a tile; a softcap and sinks, which they do not see; no `mass`."""
    n, squares = block(64, dtype), {"mass": True, "mass_of": "squared_logits"}
    s = storage([[0, 1, n - 1], [n, n + 1, 20]], 64, dtype, device)
    decode_case(backend, s, 4, append=True, max_length=1024, **squares)
    decode_case(backend, s, 3, append=False, softcap=2.0, sinks=True, **squares)
    decode_case(backend, s, 1, append=True, softcap=2.0, mass_of="squared_logits")
    s = storage([[1023, 1024], [0, 2300]], 16, dtype, device, seed=2)
    decode_case(backend, s, 2, append=True, sinks=True, **squares)
    s = storage([[0, 0], [1, 40]], 80, dtype, device, seed=1)
    decode_case(backend, s, 5, append=True, max_length=None, **squares)
    decode_case(backend, s, 5, append=False, max_length=2000, **squares)


def check_slot_write(backend: Any, device: str, dtype: torch.dtype) -> None:
    for size, with_mass in ((80, True), (64, False)):
        s = storage([[0, 1, 5], [17, 0, 2]], size, dtype, device)
        expected = s.copy()
        new = [s.normal(2, 3, size), s.normal(2, 3, size), s.integers(100, 200, 2)]
        for _ in range(2):
            reference.slot_write(*new, *expected.tensors(), expected.mass if with_mass else None)
            backend.slot_write(*new, *s.tensors(), s.mass if with_mass else None)
        same(s, expected)


def check_window_mass(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Queries that see everything, a part, and nothing; more query rows than one tile; NaN outside the regions."""
    for group, window, size in ((1, 3, 80), (3, 30, 32)):
        s = storage([[0, 1], [64, 65], [63, 150]], size, dtype, device, seed=group)
        queries = s.normal(3, window, 2 * group, size)
        query_positions = s.integers(0, 200, 3, window)
        query_positions[:, 0] = -1  # sees nothing
        for first in (None, s.integers(0, 60, 3)):
            arguments = (query_positions, s.keys, s.positions, s.start, s.length)
            got = backend.window_mass(queries, *arguments, scale=0.4, first_position=first)
            arguments = (query_positions, s.keys.double(), s.positions, s.start, s.length)
            want = reference.window_mass(queries.double(), *arguments, scale=0.4, first_position=first)
            assert got.dtype == torch.float32
            assert want.sum() > 1
            close(got, want, WEIGHT_TOLERANCE)


def check_window_scores(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Pooling wider than a region, pad queries, every option; more query rows than one tile."""
    for group, window, size, options in (
        (2, 5, 80, {}),
        (1, 70, 32, {"pool": 5, "pooling": "mean", "softcap": 2.0}),
        (3, 9, 16, {"pool": 7, "pooling": "max", "sinks": torch.tensor([0.5, -1.0, float("-inf"), 3.0, 0.0, 1.0])}),
    ):
        s = storage([[0, 1], [2, 65], [300, 33]], size, dtype, device, seed=window)
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        queries = s.normal(3, window, 2 * group, size)
        query_positions = s.integers(0, 600, 3, window)
        query_positions[1, :2] = -1
        arguments = (query_positions, s.keys, s.positions, s.start, s.length)
        got = backend.window_scores(queries, *arguments, scale=0.3, **options)
        arguments = (query_positions, s.keys.double(), s.positions, s.start, s.length)
        want = reference.window_scores(queries.double(), *arguments, scale=0.3, **options)
        assert got.dtype == torch.float32
        assert want.sum() > 1
        close(got, want, WEIGHT_TOLERANCE)


def check_window_norms(backend: Any, device: str, dtype: torch.dtype) -> None:
    """More heads than one in a group, pad queries, softcap, sinks; more queries than one tile."""
    for group, window, size, softcap, sinks in (
        (2, 5, 80, 0.0, None),
        (1, 70, 32, 2.0, None),
        (3, 9, 16, 0.0, torch.tensor([0.5, -1.0, float("-inf"), 3.0, 0.0, 1.0])),
    ):
        s = storage([[0, 1], [2, 65], [300, 33]], size, dtype, device, seed=window)
        options = {"scale": 0.3, "softcap": softcap, "sinks": None if sinks is None else sinks.to(device)}
        queries = s.normal(3, window, 2 * group, size)
        query_positions = s.integers(0, 600, 3, window)
        query_positions[1, :2] = -1
        norms = s.normal(len(s.positions), group, dtype=torch.float32).abs()
        got = backend.window_norms(queries, query_positions, s.keys, s.positions, s.start, s.length, norms, **options)
        arguments = (query_positions, s.keys.double(), s.positions, s.start, s.length, norms.double())
        want = reference.window_norms(queries.double(), *arguments, **options)
        assert got.dtype == torch.float32
        assert want.sum() > 1
        close(got, want, WEIGHT_TOLERANCE)


def check_tokens_needed(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Exact sums, so exact counts, also where the target is hit on the dot; no mass at all gives 0."""
    del dtype
    s = storage([[0, 1, 2], [64, 1025, 300]], 16, torch.float32, device)
    for tau in (0.0, 0.5, 0.9, 1.0):
        got = backend.tokens_needed(s.mass, s.positions, s.start, s.length, tau=tau)
        want = reference.tokens_needed(s.mass, s.positions, s.start, s.length, tau=tau)
        assert got.dtype == torch.int32
        assert got.tolist() == want.tolist(), tau
    assert backend.tokens_needed(s.mass * 0, s.positions, s.start, s.length, tau=0.5).eq(0).all()
    s = storage([[4]], 16, torch.float32, device)
    s.mass[s.start.item() : s.start.item() + 4] = 1.0
    needed = [
        backend.tokens_needed(s.mass, s.positions, s.start, s.length, tau=t).item() for t in (0.25, 0.26, 0.75, 2.0)
    ]
    assert needed == [1, 2, 3, 4]


def check_head_mass(backend: Any, device: str, dtype: torch.dtype) -> None:
    """A target far from every cumulative sum, so that rounding cannot move the count."""
    s = storage([[30, 0], [50, 9]], 32, dtype, device)
    queries, query_positions = s.normal(2, 4, 4, 32), s.integers(90, 99, 2, 4)
    arguments = (query_positions, s.keys.double(), s.positions, s.start, s.length)
    want = reference.head_mass(queries.double(), *arguments, scale=0.3, tau=0.6)
    nudged = [reference.head_mass(queries.double(), *arguments, scale=0.3, tau=t) for t in (0.5999, 0.6001)]
    assert nudged[0].tolist() == want.tolist() == nudged[1].tolist(), "choose another seed"
    arguments = (query_positions, s.keys, s.positions, s.start, s.length)
    assert backend.head_mass(queries, *arguments, scale=0.3, tau=0.6).tolist() == want.tolist()


def check_mean_query_logits(backend: Any, device: str, dtype: torch.dtype) -> None:
    for group, size in ((1, 64), (3, 80)):
        n = block(size, dtype)
        s = storage([[0, 1], [n, n + 1], [n - 1, 20]], size, dtype, device)
        mean = s.normal(3, 2 * group, size, dtype=torch.float32)
        got = backend.mean_query_logits(mean, s.keys, s.start, s.length, scale=0.3)
        want = reference.mean_query_logits(mean.double(), s.keys.double(), s.start, s.length, scale=0.3)
        assert got.dtype == torch.float32
        close(got, want, WEIGHT_TOLERANCE)


def check_stratified_victims(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Many ties, signed zeros and infinities; protected ends; more asked for than there is, and less than nothing."""
    del dtype
    s = storage([[0, 1, 12], [31, 1030, 40]], 16, torch.float32, device)
    scores = s.integers(-3, 4, len(s.positions)).float()
    scores[::5] = -0.0
    scores[1::7] = 1e30
    scores[2::11] = float("-inf")
    scores[3::13] = float("inf")
    first = torch.tensor([[0, 0, 3], [5, 100, 0]], dtype=torch.int32, device=device)
    last = torch.tensor([[9, 9, 20], [60, 2000, 2**31 - 1]], dtype=torch.int32, device=device)
    for ratio, evict in (
        (0.0, [[1, 1, 4], [7, 300, 40]]),
        (0.37, [[1, 1, 5], [8, 333, -2]]),
        (0.9, [[1, 0, 50], [1, 2, 21]]),
        (1.0, [[0, 1, 3], [99, 1, 0]]),
    ):
        wanted = torch.tensor(evict, dtype=torch.int32, device=device)
        arguments = (scores, s.positions, s.start, s.length)
        bounds = {"first": first, "last": last, "evict": wanted, "strata_ratio": ratio}
        got = backend.stratified_victims(*arguments, **bounds)
        want = reference.stratified_victims(*arguments, **bounds)
        assert got.dtype == torch.bool
        assert got.nonzero()[:, 0].tolist() == want.nonzero()[:, 0].tolist(), ratio
        assert want.any()


def check_fill_holes(backend: Any, device: str, dtype: torch.dtype) -> None:
    """No victim, some, all; holes only at the end; regions longer than a block."""
    for size, with_mass in ((80, True), (16, False)):
        s = storage([[0, 1, 1], [40, 1100, 9]], size, dtype, device)
        victims = torch.rand(len(s.positions), generator=s.generator).to(device) < 0.4
        starts = s.start.flatten().tolist()
        victims[starts[1]] = False
        victims[starts[2]] = True
        victims[starts[3] : starts[3] + 40] = torch.arange(40, device=device) >= 35
        victims[starts[5] : starts[5] + 9] = torch.arange(9, device=device) % 2 == 0
        expected = s.copy()
        reference.fill_holes(victims, *expected.tensors(), expected.mass if with_mass else None)
        backend.fill_holes(victims, *s.tensors(), s.mass if with_mass else None)
        # What a mover leaves behind in keys and values is free storage, the same in both.
        same(s, expected)


def check_gather_regions(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Rows repeated and dropped, with and without a mask, with and without mass, and `length` replaced in place."""
    rows = torch.tensor([1, 1, 0], device=device)
    for size, masked, with_mass in ((80, False, True), (16, True, False), (16, True, True)):
        s = storage([[0, 40, 1], [33, 1, 1100]], size, dtype, device)
        keep = torch.rand(len(s.positions), generator=s.generator).to(device) < 0.6 if masked else None
        target = storage([[33, 1, 1100], [33, 1, 1100], [0, 40, 1]], size, dtype, device, seed=1)
        target.positions.fill_(-1)
        expected = target.copy()
        masses = (s.mass, target.mass) if with_mass else (None, None)
        backend.gather_regions(rows, keep, *s.tensors(), *target.tensors(), *masses)
        masses = (s.mass, expected.mass) if with_mass else (None, None)
        reference.gather_regions(rows, keep, *s.tensors(), *expected.tensors(), *masses)
        same(target, expected)
    s = storage([[3, 20], [9, 0]], 16, dtype, device)
    target = storage([[20, 20], [20, 20]], 16, dtype, device, seed=1)
    swap = torch.tensor([1, 0], device=device)
    kept = s.length.flip(0).tolist()
    new = (target.keys, target.values, target.positions, target.start, s.length)
    backend.gather_regions(swap, None, *s.tensors(), *new)
    assert s.length.tolist() == kept


def check_argument_errors(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Storage that a kernel could not write back to is refused."""
    s = storage([[3, 4]], 16, dtype, device)
    new = [s.normal(1, 2, 16), s.normal(1, 2, 16), s.integers(0, 9, 1)]
    strided = torch.zeros(s.keys.shape[0], 32, dtype=dtype, device=device)[:, ::2]
    for error, keys in ((ValueError, strided), (TypeError, s.keys.double())):
        try:
            backend.slot_write(*new, keys, *s.tensors()[1:])
        except error:
            continue
        raise AssertionError(f"expected {error.__name__}")


DTYPE_FREE = {"tokens_needed", "stratified_victims"}
"""Checks that read float32 scores only: one dtype is enough."""

CHECKS: dict[str, Callable[[Any, str, torch.dtype], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
} | {"attention_behind": check_attention_behind}
