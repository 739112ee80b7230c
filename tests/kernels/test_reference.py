# SPDX-License-Identifier: Apache-2.0
"""The reference itself: against dense attention, numbers worked out by hand, and the papers' own example."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headkv_mm.kernels import cpu, reference, reference_scores

from .triton_cases import storage

# arXiv 2605.20600, Figure 3: positions of a region, what leaves it when 10 of the 22 must, and what stays.
FIGURE_POSITIONS = [4, 9, 10, 13, 14, 15, 16, 20, 25, 26, 27, *range(28, 39)]
FIGURE_EVICTED = [13, 14, 15, 16, 25, 31, 32, 33, 34, 36]
FIGURE_KEPT = [4, 9, 10, 20, 26, 27, 28, 29, 30, 35, 37, 38]


def int32(values: list[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense_rows(lengths: list[list[int]], size: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A query, and regions that lie one after the other with NaN between them."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.tensor(lengths).flatten()
    start = (flat + 2).cumsum(0) - flat
    keys, values = torch.full((2, int(flat.sum()) + 2 * len(flat) + 2, size), float("nan"), dtype=torch.float64)
    for begin, n in zip(start.tolist(), flat.tolist()):
        keys[begin : begin + n] = torch.randn(n, size, generator=generator, dtype=torch.float64)
        values[begin : begin + n] = torch.randn(n, size, generator=generator, dtype=torch.float64)
    heads = len(lengths[0]) * group
    query = torch.randn(len(lengths), heads, size, generator=generator, dtype=torch.float64)
    return query, keys, values, start.view(len(lengths), -1).int(), int32(lengths)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_decode_is_dense_attention_of_each_region(group: int) -> None:
    query, keys, values, start, length = dense_rows([[1, 7], [33, 0]], 16, group)
    out = reference.ragged_decode(query, keys, values, start, length, scale=0.3)
    for b, g in ((0, 0), (0, 1), (1, 0)):
        slots = slice(int(start[b, g]), int(start[b, g] + length[b, g]))
        heads = slice(g * group, (g + 1) * group)
        expected = scaled_dot_product_attention(
            query[b, heads, None], keys[slots][None], values[slots][None], scale=0.3
        )
        torch.testing.assert_close(out[b, heads], expected[:, 0], atol=1e-12, rtol=1e-12)
    assert out[1, group:].eq(0).all()


def test_decode_by_hand() -> None:
    """Two entries with logits 0 and log 3 get weights 1/4 and 3/4; a sink with logit log 4 halves both."""
    query, keys = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 9.0], [math.log(3), 9.0]])
    values, start, length = torch.tensor([[4.0, 0.0], [0.0, 8.0]]), int32([[0]]), int32([[2]])
    mass, squares = torch.ones(2), torch.ones(2)
    out = reference.ragged_decode(query, keys, values, start, length, scale=1.0, mass=mass)
    torch.testing.assert_close(out, torch.tensor([[[1.0, 6.0]]]))
    torch.testing.assert_close(mass, torch.tensor([1.25, 1.75]))
    into = {"mass": squares, "mass_of": "squared_logits", "softcap": 0.5, "sinks": torch.tensor([9.0])}
    reference.ragged_decode(query, keys, values, start, length, scale=2.0, **into)
    torch.testing.assert_close(squares, torch.tensor([1.0, 1 + (2 * math.log(3)) ** 2]))
    sinks = torch.tensor([math.log(4)])
    out = reference.ragged_decode(query, keys, values, start, length, scale=1.0, sinks=sinks)
    torch.testing.assert_close(out, torch.tensor([[[0.5, 3.0]]]))
    cap = math.log(3) / math.atanh(0.5)  # tanh maps the second logit to cap / 2
    out = reference.ragged_decode(query, keys, values, start, length, scale=1.0, softcap=cap)
    weight = 1 / (1 + math.exp(-cap / 2))
    torch.testing.assert_close(out, torch.tensor([[[4 * (1 - weight), 8 * weight]]]))


def test_append_decode_sees_the_new_entry_and_starts_its_mass_at_zero() -> None:
    keys, values, positions = torch.zeros(3, 2), torch.full((3, 2), 7.0), int32([5, -1, -1])
    start, length, mass = int32([[0]]), int32([[1]]), torch.full((3,), 9.0)
    new = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 3.0]]]), int32([6])
    out = reference.append_decode(
        torch.ones(1, 1, 2), *new, keys, values, positions, start, length, scale=1.0, mass=mass
    )
    torch.testing.assert_close(out, torch.tensor([[[4.0, 5.0]]]))  # equal weights over 7 7 and 1 3
    assert positions.tolist() == [5, 6, -1]
    assert length.tolist() == [[2]]
    assert mass.tolist() == [9.5, 0.5, 9.0]


def test_window_mass_by_hand() -> None:
    """All logits 0, so every query spreads evenly over what it sees: 1 of 3, 3 of 3, nothing; `first` hides one."""
    keys, positions = torch.zeros(5, 4), int32([2, 0, 1, -7, -7])
    arguments = (torch.zeros(1, 3, 2, 4), int32([[0, 5, -1]]), keys, positions, int32([[0]]), int32([[3]]))
    mass = reference.window_mass(*arguments, scale=1.0)
    torch.testing.assert_close(mass, torch.tensor([1 / 9, 4 / 9, 1 / 9, 0.0, 0.0]))
    mass = reference.window_mass(*arguments, scale=1.0, first_position=int32([1]))
    torch.testing.assert_close(mass, torch.tensor([1 / 6, 0.0, 1 / 6, 0.0, 0.0]))


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("options", ["plain", "softcap", "sinks", "everything"])
def test_window_scores_are_the_dense_formula(options: str, pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key by key and query by query, with math.exp: nothing of the reference is used. More queries than one block."""
    monkeypatch.setattr(reference_scores, "_QUERIES_AT_ONCE", 3)
    _, keys, _, start, length = dense_rows([[5, 9], [0, 1]], 8, 2)
    generator = torch.Generator().manual_seed(3)
    positions = torch.full((len(keys),), -7, dtype=torch.int32)
    for begin, n in zip(start.flatten().tolist(), length.flatten().tolist()):
        positions[begin : begin + n] = torch.randperm(12, generator=generator)[:n].int()
    queries = torch.randn(2, 7, 4, 8, dtype=torch.float64, generator=generator) * 2
    query_positions = int32([[3, 11, -1, 0, 7, 7, 9], [-1, 5, 12, 1, 0, 2, 30]])
    cap = 1.5 if options in ("softcap", "everything") else 0.0
    sinks = torch.randn(4, dtype=torch.float64, generator=generator) if options in ("sinks", "everything") else None
    got = reference.window_scores(
        queries, query_positions, keys, positions, start, length,
        scale=0.4, pool=3, pooling=pooling, softcap=cap, sinks=sinks,
    )  # fmt: skip
    want = [0.0] * len(keys)
    for b in range(2):
        for g in range(2):
            region = range(int(start[b, g]), int(start[b, g] + length[b, g]))
            mass = dict.fromkeys(region, 0.0)
            for q in range(7):
                for h in (2 * g, 2 * g + 1):
                    seen = [j for j in region if positions[j] <= query_positions[b, q]]
                    logits = {j: 0.4 * float(queries[b, q, h] @ keys[j]) for j in seen}
                    if cap:
                        logits = {j: cap * math.tanh(x / cap) for j, x in logits.items()}
                    below = sum(math.exp(x) for x in logits.values())
                    below += math.exp(float(sinks[h])) if sinks is not None else 0.0
                    for j, x in logits.items():
                        mass[j] += math.exp(x) / below / 14
            for j in region:
                near = [mass[k] for k in (j - 1, j, j + 1) if k in mass]
                want[j] = max(near) if pooling == "max" else sum(near) / len(near)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_window_norms_are_the_dense_formula(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key by key and query by query, as above; the root of the sum of squares, head by head."""
    monkeypatch.setattr(reference_scores, "_QUERIES_AT_ONCE", 3)
    _, keys, _, start, length = dense_rows([[5, 9], [0, 1]], 8, 2)
    generator = torch.Generator().manual_seed(4)
    positions = torch.full((len(keys),), -7, dtype=torch.int32)
    for begin, n in zip(start.flatten().tolist(), length.flatten().tolist()):
        positions[begin : begin + n] = torch.randperm(12, generator=generator)[:n].int()
    queries = torch.randn(2, 7, 4, 8, dtype=torch.float64, generator=generator) * 2
    query_positions = int32([[3, 11, -1, 0, 7, 7, 9], [-1, 5, 12, 1, 0, 2, 30]])
    norms = torch.rand(len(keys), 2, dtype=torch.float64, generator=generator)
    cap = 1.5 if options == "everything" else 0.0
    sinks = torch.randn(4, dtype=torch.float64, generator=generator) if options == "everything" else None
    got = reference.window_norms(
        queries, query_positions, keys, positions, start, length, norms, scale=0.4, softcap=cap, sinks=sinks
    )
    want = [0.0] * len(keys)
    for b in range(2):
        for g in range(2):
            region = range(int(start[b, g]), int(start[b, g] + length[b, g]))
            for r in range(2):
                squares = dict.fromkeys(region, 0.0)
                for q in range(7):
                    seen = [j for j in region if positions[j] <= query_positions[b, q]]
                    logits = {j: 0.4 * float(queries[b, q, 2 * g + r] @ keys[j]) for j in seen}
                    if cap:
                        logits = {j: cap * math.tanh(x / cap) for j, x in logits.items()}
                    below = sum(math.exp(x) for x in logits.values())
                    below += math.exp(float(sinks[2 * g + r])) if sinks is not None else 0.0
                    for j, x in logits.items():
                        squares[j] += (math.exp(x) / below) ** 2
                for j in region:
                    want[j] += math.sqrt(squares[j]) * float(norms[j, r]) / 2
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-13, rtol=1e-12)


def test_pooling_by_hand() -> None:
    """Weights 1/2, 1/4, 1/4 and, in a region of its own, 1: nothing crosses the border between the two."""
    keys, positions = torch.tensor([[math.log(2)], [0.0], [0.0], [9.0]]), int32([0, 1, 2, 0])
    arguments = (torch.ones(1, 1, 2, 1), int32([[5]]), keys, positions, int32([[0, 3]]), int32([[3, 1]]))
    for pool, pooling, scores in (
        (1, "max", [0.5, 0.25, 0.25, 1.0]),
        (3, "max", [0.5, 0.5, 0.25, 1.0]),
        (3, "mean", [0.375, 1 / 3, 0.25, 1.0]),
        (9, "mean", [1 / 3, 1 / 3, 1 / 3, 1.0]),
    ):
        got = reference.window_scores(*arguments, scale=1.0, pool=pool, pooling=pooling)
        torch.testing.assert_close(got, torch.tensor(scores), msg=f"{pool} {pooling}")


@pytest.mark.parametrize("pool, pooling, said", [(0, "max", "odd"), (4, "mean", "got 4"), (3, "median", '"median"')])
def test_pooling_that_does_not_exist(pool: int, pooling: str, said: str) -> None:
    s = storage([[3]], 16, torch.float32, "cpu")
    arguments = (s.normal(1, 2, 1, 16), int32([[5, 6]]), s.keys, s.positions, s.start, s.length)
    for backend in (reference, cpu):
        with pytest.raises(ValueError, match=said.replace('"', "['\"]")):
            backend.window_scores(*arguments, scale=1.0, pool=pool, pooling=pooling)


@pytest.mark.parametrize("tau, needed", [(0.0, 1), (0.1, 1), (0.11, 2), (0.6, 2), (0.61, 3), (1.0, 3), (2.0, 3)])
def test_tokens_needed_counts_backward_from_the_newest(tau: float, needed: int) -> None:
    mass, positions = torch.tensor([0.4, 0.1, 0.5]), int32([0, 9, 4])  # newest first: 0.1, 0.5, 0.4
    assert reference.tokens_needed(mass, positions, int32([[0]]), int32([[3]]), tau=tau).item() == needed


def test_tokens_needed_without_mass_is_zero() -> None:
    assert (
        reference.tokens_needed(torch.zeros(3), int32([0, 1, 2]), int32([[0, 3]]), int32([[3, 0]]), tau=0.5).eq(0).all()
    )


def test_mean_query_logit_is_the_mean_of_the_logits() -> None:
    _, keys, _, start, length = dense_rows([[3, 5]], 8, 1)
    queries = torch.randn(20, 1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = reference.mean_query_logits(queries.mean(0), keys, start, length, scale=0.5)
    for g in range(2):
        slots = slice(int(start[0, g]), int(start[0, g] + length[0, g]))
        each = queries[:, 0, 2 * g : 2 * g + 2] @ keys[slots].T * 0.5  # [20, R, n]
        torch.testing.assert_close(logits[slots], each.mean((0, 1)))
    assert logits.isfinite().all()


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_stratified_victims_of_the_paper(order: str) -> None:
    positions = FIGURE_POSITIONS
    if order == "shuffled":
        permutation = torch.randperm(22, generator=torch.Generator().manual_seed(0)).tolist()
        positions = [FIGURE_POSITIONS[i] for i in permutation]
    # Low scores for what the figure evicts. All of the long stratum outscores the near one: strata must not mix.
    scores = torch.tensor(
        [(0.0 if p in FIGURE_EVICTED else 1.0) + (10.0 if p < 28 else 0.0) + p / 100 for p in positions]
    )
    victims = reference.stratified_victims(
        scores,
        int32(positions),
        int32([[0]]),
        int32([[22]]),
        first=int32([[4]]),
        last=int32([[39]]),
        evict=int32([[10]]),
        strata_ratio=0.5,
    )
    assert sorted(p for p, v in zip(positions, victims.tolist()) if v) == FIGURE_EVICTED
    assert sorted(p for p, v in zip(positions, victims.tolist()) if not v) == FIGURE_KEPT


def test_stratified_victims_by_hand() -> None:
    """Ratio 0 is lowest score first, ties to the older; a small stratum hands its share over; ends are protected."""
    positions, start, length = int32([0, 1, 2, 3, 4, 5]), int32([[0]]), int32([[6]])
    scores = torch.tensor([0.0, 3.0, 1.0, 1.0, 1.0, 0.0])

    def chosen(evict: int, ratio: float) -> list[int]:
        bounds = {"first": int32([[1]]), "last": int32([[5]]), "evict": int32([[evict]])}
        victims = reference.stratified_victims(scores, positions, start, length, **bounds, strata_ratio=ratio)
        return victims.nonzero()[:, 0].tolist()

    assert chosen(2, 0.0) == [2, 3]
    assert chosen(2, 0.5) == [2, 3]
    assert chosen(1, 0.5) == [3]  # the odd one leaves from near
    assert chosen(3, 0.75) == [2, 3, 4]  # near holds one entry and can give no second
    assert chosen(9, 0.5) == [1, 2, 3, 4]
    assert chosen(-1, 0.5) == []


def test_fill_holes_by_hand() -> None:
    """Six entries, three leave: the survivors beyond the new length fill the holes in slot order."""
    keys = torch.arange(8.0)[:, None].repeat(1, 2)
    values, mass = keys * 10, torch.arange(8.0)
    positions, start, length = int32([-1, 20, 21, 22, 23, 24, 25, -1]), int32([[1]]), int32([[6]])
    victims = torch.tensor([True, True, False, True, False, True, False, True])  # outside the region: of no effect
    reference.fill_holes(victims, keys, values, positions, start, length, mass)
    assert length.tolist() == [[3]]
    assert positions.tolist() == [-1, 23, 21, 25, -1, -1, -1, -1]
    assert keys[1:4, 0].tolist() == [4.0, 2.0, 6.0]
    assert values[1:4, 1].tolist() == [40.0, 20.0, 60.0]
    assert mass[1:4].tolist() == [4.0, 2.0, 6.0]
    assert keys[[0, 7], 0].tolist() == [0.0, 7.0]


def test_gather_regions_by_hand() -> None:
    keys, positions = torch.arange(5.0)[:, None], int32([10, 11, 12, 13, 14])
    start, length, keep = int32([[0], [3]]), int32([[3], [2]]), torch.tensor([True, False, True, False, True])
    new_keys, new_values = torch.full((6, 1), -1.0), torch.full((6, 1), -1.0)
    new_positions, new_start, new_length = torch.full((6,), -1, dtype=torch.int32), int32([[3], [0]]), int32([[0], [0]])
    reference.gather_regions(
        torch.tensor([0, 1]),
        keep,
        keys,
        keys + 100,
        positions,
        start,
        length,
        new_keys,
        new_values,
        new_positions,
        new_start,
        new_length,
    )
    assert new_keys[:, 0].tolist() == [4.0, -1.0, -1.0, 0.0, 2.0, -1.0]
    assert new_values[:, 0].tolist() == [104.0, -1.0, -1.0, 100.0, 102.0, -1.0]
    assert new_positions.tolist() == [14, -1, -1, 10, 12, -1]
    assert new_length.tolist() == [[2], [1]]
