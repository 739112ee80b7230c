# SPDX-License-Identifier: Apache-2.0
"""Heads that divide one pool: exact totals and bounds, the best division, and every statistic by plain loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm.allocators import MassCurves, Pooled, Proportional, Uniform
from headkv_mm.allocators.competition import Pool
from headkv_mm.allocators.pooled import counted_of
from headkv_mm.allocators.proportional import STATISTICS
from headkv_mm.budgets import ImagePlan
from headkv_mm.pieces import Observed
from headkv_mm.plan import Plan
from headkv_mm.ragged import RaggedKV
from headkv_mm.registry import get_method
from headkv_mm.scorers import KeyNorm, LogitSpread, WindowAttention
from headkv_mm.text_plan import TextPlan

NO_SCORES = torch.empty(0)


def column(*numbers: int) -> Tensor:
    return torch.tensor(numbers)[:, None]


@given(st.data(), st.integers(1, 3), st.integers(1, 8), st.integers(0, 60))
def test_a_pool_is_divided_exactly_and_within_its_bounds(data: st.DataObject, rows: int, heads: int, free: int) -> None:
    least, most = data.draw(st.integers(0, free)), data.draw(st.integers(free, 4 * free))
    number = st.one_of(st.just(0.0), st.floats(0, 1e9))
    weights = [data.draw(st.lists(number, min_size=heads, max_size=heads)) for _ in range(rows)]
    pool = Pool(*(column(*[bound] * rows) for bound in (free, least, most, max(free, 1))))
    shares = pool.divided(torch.tensor(weights, dtype=torch.float64))
    assert shares.sum(-1).tolist() == [free * heads] * rows
    assert int(shares.min()) >= least
    assert int(shares.max()) <= most
    for row, own in enumerate(weights):  # a row is divided as if it were alone
        alone = Pool(*(column(bound) for bound in (free, least, most, max(free, 1))))
        assert alone.divided(torch.tensor([own], dtype=torch.float64)).tolist() == shares[row : row + 1].tolist()


def divisions(total: int, heads: int, least: int, most: int) -> list[tuple[int, ...]]:
    return [one for one in itertools.product(range(least, most + 1), repeat=heads) if sum(one) == total]


@given(st.data(), st.integers(2, 3), st.integers(1, 4), st.integers(0, 1))
def test_no_other_division_loses_less(data: st.DataObject, heads: int, free: int, least: int) -> None:
    most = data.draw(st.integers(free, 2 * free))
    entry = st.integers(0, 1000).map(lambda number: number / 4096)
    mass = [sorted(data.draw(st.lists(entry, min_size=9, max_size=9)), reverse=True) for _ in range(heads)]
    pool = Pool(column(free), column(least), column(most), column(free))
    for loss, over in (("sum", sum), ("largest", max)):
        worth = mass if loss == "sum" else [[sum(own[k:]) for k in range(9)] for own in mass]
        noted = torch.tensor([[own[:most] for own in worth]])
        found = pool.divided(MassCurves(loss=loss).weigh(noted, pool).double())[0].tolist()  # type: ignore[arg-type]
        lost = [
            over(sum(own[kept:]) for own, kept in zip(mass, kept_by, strict=True))
            for kept_by in divisions(free * heads, heads, least, most)
        ]
        assert over(sum(own[kept:]) for own, kept in zip(mass, found, strict=True)) <= min(lost) + 1e-6


def seen_by(plan: Plan, condition: int, tokens: int, kv_heads: int = 2, group: int = 2, asked: int = 3) -> Observed:
    """One row that holds everything; the last queries look at it."""
    generator = torch.Generator().manual_seed(tokens)
    keys = 2 * torch.randn(1, kv_heads, tokens, 8, generator=generator)
    queries = torch.randn(1, asked, kv_heads * group, 8, generator=generator)
    budget = plan.entries(tokens) - condition if isinstance(plan, TextPlan) else plan.budget  # type: ignore[attr-defined]
    return Observed(
        store=RaggedKV.over(keys, torch.randn(keys.shape, generator=generator), torch.zeros(1, dtype=torch.int32)),
        plan=plan,
        condition=torch.tensor([condition], dtype=torch.int32),
        seen=torch.tensor([tokens], dtype=torch.int32),
        scale=0.5,
        row_budgets=[budget],
        row_seen=[tokens],
        queries=queries,
        query_positions=torch.arange(tokens - asked, tokens, dtype=torch.int32)[None],
    )


def attention(observed: Observed, head: int) -> list[float]:
    """Mean attention of the queries of a KV head, position by position, by loops."""
    keys = observed.store.keys.view(2, -1, 8)[head]
    tokens = len(keys)
    assert observed.queries is not None
    total = [0.0] * tokens
    for q, query in enumerate(observed.queries[0]):
        last = tokens - len(observed.queries[0]) + q
        for r in (0, 1):
            logits = [0.5 * float(query[2 * head + r] @ key) for key in keys[: last + 1]]
            whole = sum(map(math.exp, logits))
            for index, logit in enumerate(logits):
                total[index] += math.exp(logit) / whole / len(observed.queries[0]) / 2
    return total


def by_loops(observed: Observed, statistic: str, head: int, tau: float, window: int) -> float:
    first, mass = int(observed.condition), attention(observed, head)
    last = len(mass) - window
    middle = mass[first:last]
    if statistic in ("distant", "pointed"):
        return behind_each(observed, head, window, 1 if statistic == "distant" else 2)
    if statistic == "entropy":
        shares = [one / sum(middle) for one in middle]
        return math.exp(-sum(one * math.log(one) for one in shares))
    if statistic == "curve":
        held, count = sum(mass) - sum(middle), 0
        for one in sorted(middle, reverse=True):
            count, held = count + (held < tau), held + one
        return count
    if statistic == "backward":
        count = 0
        while sum(mass[len(mass) - count :]) < tau * sum(mass[first:]):
            count += 1
        return max(count - window, 0)
    keys = observed.store.keys.view(2, -1, 8)[head]
    mean = sum(key / key.norm() for key in keys) / len(keys)
    return 1 - float(mean @ mean)


def behind_each(observed: Observed, head: int, window: int, power: int) -> float:
    """A power of every single query's attention, averaged over the group first, behind its own window."""
    keys, total = observed.store.keys.view(2, -1, 8)[head], 0.0
    assert observed.queries is not None
    for q, query in enumerate(observed.queries[0]):
        position = len(keys) - len(observed.queries[0]) + q
        shares = [(0.5 * keys[: position + 1] @ query[2 * head + r]).softmax(-1) for r in (0, 1)]
        for index in range(int(observed.condition), position + 1 - window):
            total += float(shares[0][index] + shares[1][index]) ** power / 2**power
    return total / len(observed.queries[0])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_by_loops(statistic: Any) -> None:
    observed = seen_by(TextPlan(20), condition=4, tokens=40)
    allocator = Proportional(statistic=statistic, tau=0.7, window=3)
    found = allocator.note(observed, NO_SCORES)
    expected = [by_loops(observed, statistic, head, 0.7, 3) for head in (0, 1)]
    assert found.tolist() == [pytest.approx(expected, rel=1e-4)]
    assert expected[0] != pytest.approx(expected[1])
    # Floor 0.2 of 13 is 2; the other 22 of both heads by the statistic.
    targets = allocator.allocate(observed, NO_SCORES).targets[0].tolist()
    exact = [3 + 2 + 22 * own / sum(expected) for own in expected]
    assert targets == [pytest.approx(own, abs=1) for own in exact]
    assert sum(targets) == 2 * 16


@pytest.mark.parametrize("statistic", ["distant", "pointed"])
def test_every_query_looks_back_from_itself(statistic: Any) -> None:
    """Of more queries than the window has tokens; the first of them are padding, as in a row that has fewer."""
    observed = seen_by(TextPlan(20), condition=4, tokens=40, asked=7)
    assert observed.queries is not None
    assert observed.query_positions is not None
    allocator = Proportional(statistic=statistic, window=3, grouping_queries=9)
    found = allocator.note(observed, NO_SCORES)
    power = 1 if statistic == "distant" else 2
    expected = [behind_each(observed, head, 3, power) for head in (0, 1)]
    assert found.tolist() == [pytest.approx(expected, rel=1e-4)]
    padded = replace(
        observed,
        queries=torch.cat([observed.queries[:, :2], observed.queries], dim=1),
        query_positions=torch.cat([torch.full((1, 2), -1), observed.query_positions], dim=1),
    )
    assert torch.equal(allocator.note(padded, NO_SCORES), found)


def test_contrast_leaves_more_to_the_heads_ahead() -> None:
    pool = Pool(column(100), column(0), column(400), column(100))
    noted = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)
    for contrast, expected in ((0.0, [100, 100, 100]), (1.0, [150, 75, 75]), (2.0, [200, 50, 50])):
        assert pool.divided(Proportional(contrast=contrast).weigh(noted, pool)).tolist() == [expected]
    nothing = Proportional(contrast=2.0).weigh(torch.zeros(1, 3, dtype=torch.float64), pool)
    assert pool.divided(nothing).tolist() == [[100, 100, 100]]


def test_curves_by_loops_and_as_the_pooled_scores() -> None:
    observed = seen_by(TextPlan(20), condition=4, tokens=40)
    worth = [sorted(attention(observed, head)[4:37], reverse=True) for head in (0, 1)]
    found = MassCurves(window=3, floor=0.0).note(observed, NO_SCORES)
    torch.testing.assert_close(found[0], torch.tensor(worth), rtol=1e-4, atol=1e-7)
    lost = MassCurves(window=3, floor=0.0, loss="largest").note(observed, NO_SCORES)
    expected = torch.tensor([[sum(own[k:]) for k in range(33)] for own in worth])
    torch.testing.assert_close(lost[0], expected, rtol=1e-4, atol=1e-7)
    scores = WindowAttention(window=3, pool=1).score_entries(observed)
    pooled = Pooled(alpha=0.0, window=3).allocate(observed, scores)
    curves = MassCurves(window=3, floor=0.0, most=100.0).allocate(observed, NO_SCORES)
    assert curves.targets.tolist() == pooled.targets.tolist()
    # The scorer has no say in it.
    other = MassCurves(window=3, floor=0.0, most=100.0).allocate(observed, KeyNorm().score_entries(observed))
    assert other.targets.tolist() == curves.targets.tolist()


def test_floor_and_most_bound_a_head() -> None:
    observed = seen_by(TextPlan(20), condition=4, tokens=200)
    for allocator in (MassCurves(window=3, floor=1.0), Proportional(window=3, floor=1.0), Uniform(window=3)):
        assert allocator.allocate(observed, NO_SCORES).targets.tolist() == [[16, 16]]
    assert MassCurves(window=3, most=1.0).allocate(observed, NO_SCORES).targets.tolist() == [[16, 16]]
    bounded = Proportional(window=3, floor=0.5, most=1.2, statistic="backward").allocate(observed, NO_SCORES)
    assert int(bounded.targets.min()) >= 3 + 6
    assert int(bounded.targets.max()) <= 3 + 15


def test_what_counts_while_an_image_is_written() -> None:
    plan = ImagePlan(tokens=64, row=8, budget=24)
    # 20 of 64 tokens after 4 of the prompt, of which 10 are the window: 10 of 54 are there, so 3 of 14 count.
    assert counted_of(seen_by(plan, condition=4, tokens=24), [10]).tolist() == [[3]]
    assert counted_of(seen_by(TextPlan(20), condition=4, tokens=40), [3]).tolist() == [[13]]
    targets = MassCurves(window_rows=1.0).allocate(seen_by(plan, condition=4, tokens=24), NO_SCORES).targets
    assert targets.sum(-1).tolist() == [48]
    assert int(targets.min()) >= 10 + 2  # the window, and the floor


def test_pieces_by_their_own_names() -> None:
    method = get_method("headkv").with_options({"allocator": "MassCurves", "loss": "largest", "scope": "model"})
    assert method.image is not None
    assert method.image.allocator == MassCurves(loss="largest", scope="model")
    assert method.image.scorer == get_method("headkv").image.scorer  # type: ignore[union-attr]
    assert get_method("snapkv").with_options({"scorer": "LogitSpread"}).text.scorer == LogitSpread()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"unknown method 'MassCurve'; the allocator may be .*adakv.* MassCurves"):
        get_method("headkv").with_options({"allocator": "MassCurve"})


def test_refused_options() -> None:
    for options, message in (
        ({"floor": 1.5}, "floor must be a share"),
        ({"most": 0.5}, "most must be at least one budget"),
        ({"scope": "row"}, "scope must be 'layer' or 'model'"),
        ({"grouping_queries": 0}, "grouping_queries must be at least 1"),
        ({"loss": "mean"}, "loss must be 'sum' or 'largest'"),
    ):
        with pytest.raises(ValueError, match=message):
            MassCurves(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistic must be one of entropy"):
        Proportional(statistic="mass")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau must lie in"):
        Proportional(tau=0.0)
    with pytest.raises(ValueError, match="contrast must not be negative"):
        Proportional(contrast=-1.0)
    with pytest.raises(RuntimeError, match="nothing was noted"):
        MassCurves().divide([(seen_by(TextPlan(20), 4, 40), NO_SCORES)])
