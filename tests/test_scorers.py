# SPDX-License-Identifier: Apache-2.0
"""Every scorer that compares entries of a region, against its formula written with loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headkv_mm import scorers
from headkv_mm.pieces import Observed
from headkv_mm.plan import LayerPlace
from headkv_mm.ragged import RaggedKV
from headkv_mm.scorers import ExpectedAttention, KeyDifference, KeyNorm, Random, Redundancy
from headkv_mm.text_plan import TextPlan

LENGTHS, KV_HEADS, GROUP, HEAD_DIM = (23, 40), 2, 3, 8
LONGEST = max(LENGTHS)
SCALE = 0.7
Formula = Callable[[Tensor, Tensor, Tensor], list[float]]


def observation(
    *, rows: tuple[int, ...] = (0, 1), decoding: bool = False, dtype: torch.dtype = torch.float32, layer: int = 0
) -> Observed:
    """Two left-padded prompts whose padding is NaN; `decoding`: some entries were evicted, in place."""
    lengths = [LENGTHS[row] for row in rows]
    keys, values = (torch.full((len(rows), KV_HEADS, max(lengths), HEAD_DIM), float("nan")) for _ in range(2))
    queries = torch.zeros(len(rows), max(lengths), KV_HEADS * GROUP, HEAD_DIM)
    for index, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row)
        shape = (KV_HEADS, LENGTHS[row], HEAD_DIM)
        keys[index, :, max(lengths) - LENGTHS[row] :] = torch.randn(shape, generator=generator) + 0.3
        values[index, :, max(lengths) - LENGTHS[row] :] = torch.randn(shape, generator=generator)
        queries[index, max(lengths) - LENGTHS[row] :] = torch.randn(
            LENGTHS[row], KV_HEADS * GROUP, HEAD_DIM, generator=generator
        )
    padding = torch.tensor([max(lengths) - length for length in lengths], dtype=torch.int32)
    store = RaggedKV.over(keys.to(dtype), values.to(dtype), padding)
    if decoding:
        # Every third entry of the first head and every fourth of the second.
        leaves = torch.zeros_like(store.positions, dtype=torch.bool)
        for row in range(len(rows)):
            for head in range(KV_HEADS):
                first = int(store.start[row, head])
                leaves[first : first + lengths[row] : 3 + head] = True
        store.evict(leaves)
    seen = torch.tensor(lengths, dtype=torch.int32)
    ages = torch.arange(max(lengths), 0, -1)
    return Observed(
        store=store,
        plan=TextPlan(16, place=LayerPlace(layer, 3)),
        condition=torch.full_like(seen, 2),
        seen=seen,
        scale=SCALE,
        row_budgets=[14] * len(rows),
        row_seen=lengths,
        queries=queries.to(dtype),
        query_positions=(seen[:, None] - ages).clamp(min=-1).to(torch.int32),
    )


def by_position(observed: Observed, scores: Tensor) -> list[list[dict[int, float]]]:
    """Scores by row, head and position."""
    store = observed.store
    return [
        [
            {
                int(store.positions[slot]): float(scores[slot])
                for slot in range(int(store.start[row, head]), int(store.start[row, head] + store.length[row, head]))
            }
            for head in range(store.kv_heads)
        ]
        for row in range(store.rows)
    ]


def entries(observed: Observed, row: int, head: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Positions in order, their keys and values, and the queries [Q, R, D] of the head's group; all float64."""
    store = observed.store
    slots = range(int(store.start[row, head]), int(store.start[row, head] + store.length[row, head]))
    ordered = sorted(slots, key=lambda slot: int(store.positions[slot]))
    real = observed.query_positions[row] >= 0
    queries = observed.queries[row, real, head * GROUP : (head + 1) * GROUP].double()
    positions = [int(store.positions[slot]) for slot in ordered]
    return positions, store.keys[ordered].double(), store.values[ordered].double(), queries


def check(scorer: Any, formula: Callable[[list[int], Tensor, Tensor, Tensor], list[float]], observed: Observed) -> None:
    found = by_position(observed, scorer.score_entries(observed))
    for row in range(observed.store.rows):
        for head in range(KV_HEADS):
            positions, keys, values, queries = entries(observed, row, head)
            expected = formula(positions, keys, values, queries)
            assert found[row][head] == pytest.approx(dict(zip(positions, expected, strict=True)), rel=2e-5, abs=1e-7)


def norm(vector: Tensor) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in vector))


def dot(one: Tensor, other: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("decoding", [False, True])
def test_key_norm(decoding: bool) -> None:
    observed = observation(decoding=decoding)
    found = by_position(observed, KeyNorm().score_entries(observed))
    for row in range(2):
        for head in range(KV_HEADS):
            positions, keys, _, _ = entries(observed, row, head)
            expected = {at: -norm(key) for at, key in zip(positions, keys, strict=True)}
            assert found[row][head] == pytest.approx(expected, rel=2**-14)


def test_a_key_and_its_rotation_have_the_same_norm() -> None:
    """But for rounding, which must not decide."""
    observed = observation()
    keys = observed.store.keys
    turn = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(0))).Q
    before = KeyNorm().score_entries(observed)
    exact = -torch.linalg.vector_norm(keys, dim=-1)
    keys.copy_(keys @ turn)
    filled = observed.store.filled()
    equal = (KeyNorm().score_entries(observed) == before)[filled].float().mean()
    assert equal > 0.95
    assert equal > (-torch.linalg.vector_norm(keys, dim=-1) == exact)[filled].float().mean()


@pytest.mark.parametrize("decoding", [False, True])
def test_key_difference(decoding: bool) -> None:
    def formula(positions: list[int], keys: Tensor, values: Tensor, queries: Tensor) -> list[float]:
        anchor = sum(key / norm(key) for key in keys) / len(keys)
        return [-dot(key, anchor) / norm(key) / norm(anchor) for key in keys]

    def by_value(positions: list[int], keys: Tensor, values: Tensor, queries: Tensor) -> list[float]:
        plain = formula(positions, keys, values, queries)
        return [(1 + score) * norm(value) for score, value in zip(plain, values, strict=True)]

    check(KeyDifference(), formula, observation(decoding=decoding))
    check(KeyDifference(by_value=True), by_value, observation(decoding=decoding))


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("count", [1, 4, 128])
def test_expected_attention(decoding: bool, count: int) -> None:
    epsilon = 0.02

    def formula(positions: list[int], keys: Tensor, values: Tensor, queries: Tensor) -> list[float]:
        attention = torch.zeros(len(keys), dtype=torch.float64)
        for head in range(GROUP):
            last = queries[-count:, head]
            mean = last.mean(0)
            covariance = (last - mean).T @ (last - mean) / len(last)
            expected = [math.exp(SCALE * dot(mean, key) + SCALE**2 * dot(key, covariance @ key) / 2) for key in keys]
            attention += torch.tensor(expected, dtype=torch.float64) / sum(expected) / GROUP
        return [(float(share) + epsilon) * norm(value) for share, value in zip(attention, values, strict=True)]

    check(ExpectedAttention(queries=count, epsilon=epsilon), formula, observation(decoding=decoding))


def likeness_formula(keys: Tensor, threshold: float) -> list[float]:
    """Softmax of the mean cosine similarity, the newest that an entry resembles not counted."""
    count = len(keys)
    table = [[dot(one, other) / norm(one) / norm(other) for other in keys] for one in keys]
    for row in range(count):
        table[row][row] = 0.0
        alike = [column for column in range(count) if table[row][column] > threshold]
        if alike:
            table[row][max(alike)] = 0.0
    mean = [sum(table[row][column] for row in range(count)) / count for column in range(count)]
    total = sum(math.exp(value) for value in mean)
    return [math.exp(value) / total for value in mean]


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("importance", [0.1, 0.6])
def test_redundancy(threshold: float, pool: int, importance: float) -> None:
    window = 5

    def formula(positions: list[int], keys: Tensor, values: Tensor, queries: Tensor) -> list[float]:
        received = [0.0] * len(keys)
        for age in range(1, window + 1):
            newest = len(keys) - age
            for head in range(GROUP):
                weights = [math.exp(SCALE * dot(queries[newest, head], keys[at])) for at in range(newest + 1)]
                for at, weight in enumerate(weights):
                    received[at] += weight / sum(weights) / window / GROUP
        half = pool // 2
        pooled = [max(received[max(at - half, 0) : at + half + 1]) for at in range(len(keys))]
        redundant = likeness_formula(keys, threshold)
        return [importance * a - (1 - importance) * r for a, r in zip(pooled, redundant, strict=True)]

    scorer = Redundancy(window=window, pool=pool, importance=importance, threshold=threshold)
    check(scorer, formula, observation())


def test_redundancy_while_decoding_takes_the_attention_that_was_added_up() -> None:
    observed = observation(decoding=True)
    store = observed.store
    mass = torch.rand(store.positions.shape, generator=torch.Generator().manual_seed(0)) * 5
    given = by_position(observed, mass)
    observed = Observed(**{**vars(observed), "added_up": mass})
    found = by_position(observed, Redundancy(pool=3).score_entries(observed))
    for row in range(2):
        for head in range(KV_HEADS):
            positions, keys, _, _ = entries(observed, row, head)
            received = [given[row][head][at] for at in positions]
            share = [value / sum(received) for value in received]
            redundant = likeness_formula(keys, 0.5)
            expected = {
                at: 0.1 * max(share[max(index - 1, 0) : index + 2]) - 0.9 * redundant[index]
                for index, at in enumerate(positions)
            }
            assert found[row][head] == pytest.approx(expected, rel=2e-5, abs=1e-7)


def test_redundancy_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = observation()
    whole = Redundancy().score_entries(observed)
    monkeypatch.setattr("headkv_mm.scorers.redundancy._BLOCK_ELEMENTS", 2 * KV_HEADS * LONGEST * 3)
    assert torch.allclose(Redundancy().score_entries(observed), whole, atol=1e-7)
    expected = ExpectedAttention().score_entries(observed)
    monkeypatch.setattr("headkv_mm.scorers.expected._BLOCK_ELEMENTS", 1)
    assert torch.allclose(ExpectedAttention().score_entries(observed), expected, atol=1e-7)
    difference = KeyDifference().score_entries(observed)
    monkeypatch.setattr("headkv_mm.scorers.keys._BLOCK", 7)
    assert torch.allclose(KeyDifference().score_entries(observed), difference, atol=1e-7)


def test_random_depends_on_seed_layer_head_and_position_only() -> None:
    found = by_position(observation(), Random().score_entries(observation()))
    numbers = [score for row in found for head in row for score in head.values()]
    assert all(0 <= score < 1 for score in numbers)
    # Rows share their numbers, whatever their length; what was evicted changes nothing.
    for head in range(KV_HEADS):
        assert found[0][head].items() <= found[1][head].items()
    fewer = observation(decoding=True)
    for row, heads in enumerate(by_position(fewer, Random().score_entries(fewer))):
        for head, kept in enumerate(heads):
            assert kept.items() <= found[row][head].items()
    # Heads, layers and seeds have different ones.
    assert found[1][0].values() != found[1][1].values()
    others = [(Random(), observation(layer=1)), (Random(seed=1), observation())]
    for scorer, observed in others:
        other = by_position(observed, scorer.score_entries(observed))
        assert not set(other[1][0].values()) & set(found[1][0].values())


def test_random_numbers_are_spread_evenly() -> None:
    keys = torch.zeros(1, 4, 5000, 1)
    store = RaggedKV.over(keys, keys, torch.zeros(1, dtype=torch.int32))
    seen = torch.tensor([5000], dtype=torch.int32)
    observed = Observed(store, TextPlan(16), seen, seen, 1.0)
    scores = Random(seed=3).score_entries(observed).view(4, 5000)
    assert scores.mean(-1).tolist() == pytest.approx([0.5] * 4, abs=0.02)
    assert torch.histc(scores, 10, 0, 1).tolist() == pytest.approx([2000] * 10, rel=0.1)
    # Heads are independent of each other, and neighbours too.
    assert torch.corrcoef(scores).triu(1).abs().max() < 0.05
    assert abs(float(torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1])) < 0.05


@pytest.mark.parametrize(
    "scorer",
    [KeyNorm(), KeyDifference(), KeyDifference(by_value=True), ExpectedAttention(), Redundancy(), Random()],
    ids=repr,
)
def test_a_row_scores_as_it_would_alone(scorer: Any) -> None:
    for decoding in (False, True):
        together = observation(decoding=decoding)
        found = by_position(together, scorer.score_entries(together))
        for row in range(2):
            alone = observation(rows=(row,), decoding=decoding)
            expected = by_position(alone, scorer.score_entries(alone))[0]
            for head in range(KV_HEADS):
                assert found[row][head] == pytest.approx(expected[head], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "scorer",
    [KeyNorm(), KeyDifference(), KeyDifference(by_value=True), ExpectedAttention(), Redundancy(), Random()],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_model_is(scorer: Any, dtype: torch.dtype) -> None:
    observed = observation(dtype=dtype)
    scores = scorer.score_entries(observed)
    assert scores.dtype == torch.float32
    exact = scorer.score_entries(observation())[observed.store.filled()]
    assert torch.isfinite(exact).all()
    assert torch.allclose(scores[observed.store.filled()], exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ExpectedAttention", {"queries": 0}, "queries must be a whole number"),
        ("ExpectedAttention", {"epsilon": -1.0}, "epsilon must not be negative"),
        ("Redundancy", {"pool": 4}, "pool must be an odd number"),
        ("Redundancy", {"importance": 1.5}, r"importance must lie in \[0, 1\]"),
        ("Redundancy", {"threshold": 2.0}, "threshold is a cosine"),
        ("Random", {"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(scorers, name)(**options)


@pytest.mark.parametrize(
    "scorer",
    [KeyNorm(), KeyDifference(), KeyDifference(by_value=True), ExpectedAttention(), Redundancy(), Random()],
    ids=repr,
)
def test_nothing_is_read_from_the_device_while_decoding(scorer: Any) -> None:
    """Tensors on the meta device have no content, so whoever asks for it fails."""
    observed = observation(decoding=True)
    store = observed.store
    fields = {name: value.to("meta") for name, value in vars(store).items() if isinstance(value, Tensor)}
    fields = {**vars(store), **fields, "mass": torch.empty(store.positions.shape, device="meta")}
    tensors = {name: value.to("meta") for name, value in vars(observed).items() if isinstance(value, Tensor)}
    away = Observed(**{**vars(observed), **tensors, "store": RaggedKV(**fields), "added_up": fields["mass"]})
    scores = scorer.score_entries(away)
    assert scores.device.type == "meta"
    assert scores.shape == store.positions.shape
