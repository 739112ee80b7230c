# SPDX-License-Identifier: Apache-2.0
"""`attention_behind`: the reference against loops and numbers by hand, and what no backend may depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headkv_mm import kernels
from headkv_mm.kernels import cpu, reference, reference_behind

from .triton_cases import Storage, storage

BACKENDS = {"numba": cpu, "reference": reference}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


def int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_reference_is_the_formula(options: str, power: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key by key and query by query, with math.exp: nothing of the reference is used. More queries than one block."""
    monkeypatch.setattr(reference_behind, "_QUERIES_AT_ONCE", 3)
    s = storage([[5, 9], [0, 8]], 8, torch.float64, "cpu")
    queries = s.normal(2, 7, 4, 8) * 2
    query_positions = int32([[3, 11, -1, 0, 7, 7, 9], [-1, 5, 12, 1, 0, 2, 30]])
    window, first = [2, 5], [3, 1] if options == "everything" else [0, 0]
    cap = 1.5 if options == "everything" else 0.0
    sinks = s.normal(4) if options == "everything" else None
    got = reference.attention_behind(
        queries, query_positions, s.keys, s.positions, s.start, s.length, int32(window),
        scale=0.4, power=power, first_position=int32(first) if any(first) else None, softcap=cap, sinks=sinks,
    )  # fmt: skip
    for b in range(2):
        for g in range(2):
            region = range(int(s.start[b, g]), int(s.start[b, g] + s.length[b, g]))
            own = [q for q in range(7) if query_positions[b, q] >= 0]
            total = 0.0
            for q in own:
                weights = dict.fromkeys(region, 0.0)
                for h in (2 * g, 2 * g + 1):
                    seen = [j for j in region if s.positions[j] <= query_positions[b, q]]
                    logits = {j: 0.4 * float(queries[b, q, h] @ s.keys[j]) for j in seen}
                    if cap:
                        logits = {j: cap * math.tanh(x / cap) for j, x in logits.items()}
                    below = sum(map(math.exp, logits.values()))
                    below += math.exp(float(sinks[h])) if sinks is not None else 0.0
                    for j, x in logits.items():
                        weights[j] += math.exp(x) / below / 2
                last = int(query_positions[b, q]) - window[b]
                total += sum(weights[j] ** power for j in region if first[b] <= s.positions[j] <= last)
            assert float(got[b, g]) == pytest.approx(total / len(own), rel=1e-12)
    assert got.gt(0).tolist() == [[True, True], [False, True]]


@every_backend
def test_by_hand(backend: Any) -> None:
    """All logits 0. The query at 3 gives 4 entries 1/4, of which 1 and 2 count; that at 1 has nothing behind it."""
    keys, positions = torch.zeros(5, 4), int32([2, 0, 3, 1, -7])
    arguments = (torch.zeros(1, 3, 2, 4), int32([[3, 1, -1]]), keys, positions, int32([[0]]), int32([[4]]), int32([1]))
    for power, found in ((1, 0.25), (2, 0.0625)):
        got = backend.attention_behind(*arguments, scale=1.0, power=power, first_position=int32([1]))
        assert got.tolist() == [[found]]
    # The first position too: 3/4 and 1/2.
    assert backend.attention_behind(*arguments, scale=1.0).tolist() == [[0.625]]


def test_one_far_entry_counts_more_than_many() -> None:
    keys = torch.zeros(2, 9, 1)
    keys[0, 2] = 30.0
    positions = torch.arange(9).int().repeat(2)
    arguments = (torch.ones(1, 1, 2, 1), int32([[8]]), keys.view(18, 1), positions, int32([[0, 9]]), int32([[9, 9]]))
    for power, flat in ((1, 8 / 9), (2, 8 / 81)):
        got = kernels.attention_behind(*arguments, int32([1]), scale=1.0, power=power)[0]
        torch.testing.assert_close(got, torch.tensor([1.0, flat]))


def rows_alone(s: Storage, queries: Tensor, query_positions: Tensor, window: Tensor, first: Tensor) -> list[Tensor]:
    """Every row as a call of its own, its pad queries left out."""
    found = []
    for row in range(len(queries)):
        real = query_positions[row] >= 0
        found.append(
            kernels.attention_behind(
                queries[row, real][None], query_positions[row, real][None], s.keys, s.positions,
                s.start[row, None], s.length[row, None], window[row, None],
                scale=0.4, power=2, first_position=first[row, None],
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("group", [1, 2, 3, 40])
def test_a_row_does_not_depend_on_the_others_or_on_padding(group: int, size: int) -> None:
    """To the bit, wherever the pad queries are; a group of 40 is larger than a block of queries."""
    s = storage([[60, 33], [201, 7], [131, 90]], size, torch.float32, "cpu", seed=group)
    queries, query_positions = s.normal(3, 45, 2 * group, size), s.integers(100, 400, 3, 45)
    query_positions[0, :22] = -1
    query_positions[1, 11::2] = -1
    window, first = int32([9, 30, 1]), int32([0, 4, 9])
    together = kernels.attention_behind(
        queries, query_positions, s.keys, s.positions, s.start, s.length, window,
        scale=0.4, power=2, first_position=first,
    )  # fmt: skip
    assert together.gt(0).all()
    assert torch.equal(together, torch.cat(rows_alone(s, queries, query_positions, window, first)))


@every_backend
def test_positions_decide_and_not_slots(backend: Any) -> None:
    s = storage([[70, 41]], 16, torch.float32, "cpu")
    queries, query_positions = s.normal(1, 6, 4, 16), s.integers(20, 140, 1, 6)
    found = []
    for _ in range(2):
        arguments = (s.keys, s.positions, s.start, s.length, int32([8]))
        found.append(backend.attention_behind(queries, query_positions, *arguments, scale=0.4, power=2))
        for begin, count in zip(s.start[0].tolist(), s.length[0].tolist(), strict=True):
            slots = slice(begin, begin + count)
            order = s.positions[slots].argsort()
            s.keys[slots], s.positions[slots] = s.keys[slots][order], s.positions[slots][order]
    assert found[0].gt(0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0.0)


@every_backend
def test_nan_is_not_hidden_from_whom_it_concerns(backend: Any) -> None:
    """It is in the result of the head that has it, unless no query sees the entry."""
    s = storage([[9, 9]], 16, torch.float32, "cpu")
    begin = int(s.start[0, 0])
    s.keys[begin + 4] = float("nan")
    for position, finite in ((20, [False, True]), (7, [True, True])):
        s.positions[begin + 4] = 8
        query_positions = int32([[position, position, -1]])
        arguments = (s.normal(1, 3, 2, 16), query_positions, s.keys, s.positions, s.start, s.length, int32([2]))
        assert backend.attention_behind(*arguments, scale=0.4)[0].isfinite().tolist() == finite


@every_backend
def test_other_powers_are_refused(backend: Any) -> None:
    s = storage([[3]], 16, torch.float32, "cpu")
    arguments = (s.normal(1, 1, 1, 16), int32([[9]]), s.keys, s.positions, s.start, s.length, int32([1]))
    for power in (0, 3):
        with pytest.raises(ValueError, match=rf"power must be 1 .* or 2 .*, got {power}"):
            backend.attention_behind(*arguments, scale=1.0, power=power)
