# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a CUDA device: the checks of the interpreter, long regions, and what only a device can show."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from headkv_mm.kernels import reference

from ..kernels.triton_cases import OUTPUT_TOLERANCE, WEIGHT_TOLERANCE, close, storage
from ..kernels.triton_checks import CHECKS, DTYPE_FREE, decode_case

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    from headkv_mm.kernels import gpu as backend

    return backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_matches_reference(gpu: ModuleType, check: str, dtype: torch.dtype) -> None:
    if check in DTYPE_FREE and dtype != torch.float32:
        pytest.skip("reads float32 scores only")
    CHECKS[check](gpu, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 32])
def test_decode_shapes(gpu: ModuleType, group: int, size: int, dtype: torch.dtype) -> None:
    for append in (False, True):
        for lengths in ([[300, 0], [1023, 17]], [[5000, 1], [0, 2048]]):
            s = storage(lengths, size, dtype, "cuda")
            decode_case(gpu, s, group, append=append, softcap=20.0, sinks=True, mass=True)


def test_long_regions_evict_and_pack_like_the_reference(gpu: ModuleType) -> None:
    s = storage([[20000, 3], [0, 4097]], 64, torch.bfloat16, "cuda")
    first, last = torch.full_like(s.length, 4), s.length * 2 - 32
    scores = s.normal(len(s.positions), dtype=torch.float32)
    arguments = {"first": first, "last": last, "evict": s.length // 3, "strata_ratio": 0.4}
    victims = gpu.stratified_victims(scores, s.positions, s.start, s.length, **arguments)
    want = reference.stratified_victims(scores, s.positions, s.start, s.length, **arguments)
    assert torch.equal(victims, want)
    packed = s.copy()
    reference.fill_holes(want, *packed.tensors(), packed.mass)
    gpu.fill_holes(victims, *s.tensors(), s.mass)
    for got, expected in zip(s.tensors(), packed.tensors()):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_scores_of_a_whole_prompt(gpu: ModuleType) -> None:
    """Every token is a query, at two lengths, without a [Q, n] matrix in memory."""
    for tokens in (3000, 4001):
        s = storage([[tokens, tokens]], 64, torch.bfloat16, "cuda")
        for begin in s.start.flatten().tolist():
            s.positions[begin : begin + tokens] = torch.arange(tokens, dtype=torch.int32, device="cuda")
        queries = s.normal(1, tokens, 4, 64)
        query_positions = torch.arange(tokens, dtype=torch.int32, device="cuda")[None]
        arguments = (query_positions, s.keys, s.positions, s.start, s.length)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = gpu.window_scores(queries, *arguments, scale=0.125, pool=7)
        assert torch.cuda.max_memory_allocated() - before < tokens * tokens
        arguments = (query_positions, s.keys.double(), s.positions, s.start, s.length)
        close(got, reference.window_scores(queries.double(), *arguments, scale=0.125, pool=7), WEIGHT_TOLERANCE)


def test_launchers_never_wait_for_the_device(gpu: ModuleType) -> None:
    s = storage([[300, 40], [1, 900]], 64, torch.bfloat16, "cuda", slack=8)
    wide = storage([[300, 40], [1, 900]], 64, torch.bfloat16, "cuda", slack=8)
    query, queries = s.normal(2, 8, 64), s.normal(2, 5, 8, 64)
    query_positions = s.integers(0, 2000, 2, 5)
    new = [s.normal(2, 2, 64), s.normal(2, 2, 64), s.integers(5000, 5001, 2)]
    bounds = {"first": torch.zeros_like(s.length), "last": s.length * 2, "evict": s.length // 2}
    scores, sinks = torch.zeros(len(s.positions), device="cuda"), torch.zeros(8, device="cuda")
    rows = torch.tensor([0, 1], device="cuda")

    def step() -> None:
        for max_length in (1000, 3000):
            gpu.append_decode(query, *new, *s.tensors(), scale=0.1, max_length=max_length, mass=s.mass)
        gpu.head_mass(queries, query_positions, s.keys, s.positions, s.start, s.length, scale=0.1, tau=0.5)
        pooling = {"pool": 5, "softcap": 30.0, "sinks": sinks}
        gpu.window_scores(queries, query_positions, s.keys, s.positions, s.start, s.length, scale=0.1, **pooling)
        gpu.mean_query_logits(query.float(), s.keys, s.start, s.length, scale=0.1)
        victims = gpu.stratified_victims(scores, s.positions, s.start, s.length, **bounds, strata_ratio=0.5)
        gpu.gather_regions(rows, ~victims, *s.tensors(), *wide.tensors())
        gpu.fill_holes(victims, *s.tensors(), s.mass)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_append_decode_in_a_cuda_graph(gpu: ModuleType) -> None:
    """The capture holds no length, so each replay appends where the last one stopped."""
    s = storage([[3, 0], [50, 130]], 64, torch.float16, "cuda", slack=16)
    query = s.normal(2, 4, 64)
    new = [s.normal(2, 2, 64), s.normal(2, 2, 64), s.integers(700, 701, 2)]
    scratch = s.copy()
    gpu.append_decode(query, *new, *scratch.tensors(), scale=0.2, max_length=1024)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    expected = s.copy(torch.float64)
    with torch.cuda.graph(graph):
        out = gpu.append_decode(query, *new, *s.tensors(), scale=0.2, max_length=1024)
    for _ in range(4):
        new[0].copy_(s.normal(2, 2, 64))
        new[1].copy_(s.normal(2, 2, 64))
        graph.replay()
        wide = [new[0].double(), new[1].double(), new[2]]
        want = reference.append_decode(query.double(), *wide, *expected.tensors(), scale=0.2)
        close(out, want, OUTPUT_TOLERANCE[torch.float16])
        assert torch.equal(s.length, expected.length)
        assert torch.equal(s.positions, expected.positions)


def test_result_does_not_depend_on_slot_order_or_other_rows(gpu: ModuleType) -> None:
    s = storage([[2500]], 64, torch.float32, "cuda")
    query = s.normal(1, 2, 64)
    alone = gpu.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.2, max_length=4096)
    base = int(s.start)
    shuffled = base + torch.randperm(2500, device="cuda")
    keys, values = s.keys.clone(), s.values.clone()
    keys[base : base + 2500], values[base : base + 2500] = s.keys[shuffled], s.values[shuffled]
    again = gpu.ragged_decode(query, keys, values, s.start, s.length, scale=0.2, max_length=4096)
    close(again, alone, WEIGHT_TOLERANCE)
    starts, lengths = s.start.expand(3, 1).contiguous(), torch.tensor([[2500], [0], [9]], device="cuda").int()
    many = gpu.ragged_decode(query.expand(3, 2, 64), s.keys, s.values, starts, lengths, scale=0.2, max_length=4096)
    assert torch.equal(many[0], alone[0])
