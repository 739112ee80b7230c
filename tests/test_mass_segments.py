# SPDX-License-Identifier: Apache-2.0
"""Selection by segments of equal attention mass, against loops over one head at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache
from headkv_mm.selectors import MassSegments
from headkv_mm.selectors.mass_segments import quotas, segment_bound, segments

SIZES = st.sampled_from([1, 2, 7, 40, 300])
SELECTORS = st.builds(
    MassSegments,
    mass_step=st.sampled_from([0.02, 0.3, 1.0]),
    shortest=st.sampled_from([1, 3, 32]),
    longest=st.sampled_from([32, 50, 1024]),
    least=st.integers(0, 9),
)


def naive_segments(mass: list[float], selector: MassSegments) -> list[int]:
    """Lengths of the segments of one head."""
    lengths, current, total = list[int](), 0, 0.0
    goal = selector.mass_step
    for value in mass:
        current, total = current + 1, total + value
        full = current >= selector.shortest and total >= goal - 1e-9 * selector.mass_step
        if full or current == selector.longest:
            lengths.append(current)
            current = 0
            goal = (int(total / selector.mass_step + 1e-9) + 1) * selector.mass_step
    return [*lengths, current] if current else lengths


def naive_quotas(weights: list[float], lengths: list[int], held: list[int], keep: int, least: int) -> list[int]:
    """One head's quotas: raise a common scale until the shares between the bounds use up what is kept."""
    smallest = min(least, (keep - sum(held)) // len(lengths))
    low = [min(max(inside, smallest), length) for inside, length in zip(held, lengths)]
    even = sum(weights) / len(weights) * 1e-12  # a segment without mass takes what no other can take
    weights = [weight + even for weight in weights]
    fixed: dict[int, float] = {}
    while True:  # shares outside their bounds are fixed one side at a time, the worse side first
        free = [index for index in range(len(weights)) if index not in fixed]
        if not free:
            break
        scale = (keep - sum(fixed.values())) / sum(weights[index] for index in free)
        over = [index for index in free if weights[index] * scale > lengths[index]]
        under = [index for index in free if weights[index] * scale < low[index]]
        too_much = sum(weights[index] * scale - lengths[index] for index in over)
        too_little = sum(low[index] - weights[index] * scale for index in under)
        if not over and not under:
            fixed |= {index: weights[index] * scale for index in free}
        elif too_much >= too_little:
            fixed |= {index: float(lengths[index]) for index in over}
        else:
            fixed |= {index: float(low[index]) for index in under}
    whole = [int(fixed[index] + 1e-7) for index in range(len(weights))]
    order = sorted(range(len(weights)), key=lambda index: whole[index] - fixed[index])
    for index in [index for index in order if whole[index] < lengths[index]][: keep - sum(whole)]:
        whole[index] += 1
    return whole


def heads(data: Any, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mass, scores, filled, protected and keep of two rows of two heads."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    length = torch.randint(1, size + 1, (2, 2, 1), generator=generator)
    filled = torch.arange(size) < length
    sharp = data.draw(st.sampled_from([0, 1, 6, 30]))
    mass = torch.rand(2, 2, size, generator=generator, dtype=torch.float64) ** sharp * filled
    mass = mass / mass.sum(-1, keepdim=True)
    scores = torch.randint(0, 6, (2, 2, size), generator=generator).float()
    keep = (torch.rand(2, 2, generator=generator) * (length[..., 0] + 1)).long().clamp(min=1).minimum(length[..., 0])
    protected = torch.zeros_like(filled)
    for b in range(2):
        for g in range(2):
            inside = int(torch.rand(1, generator=generator) * (keep[b, g] + 1))
            protected[b, g, torch.randperm(int(length[b, g]), generator=generator)[:inside]] = True
    return mass, scores, filled, protected, keep


@settings(deadline=None, max_examples=60)
@given(st.data(), SIZES, SELECTORS)
def test_it_ends_for_any_sizes_and_keeps_exactly_what_it_should(data: Any, size: int, selector: MassSegments) -> None:
    mass, scores, filled, protected, keep = heads(data, size)
    stays = selector.chosen(mass, scores, filled, protected, keep)
    assert torch.equal(stays.sum(-1), keep)
    assert not (stays & ~filled).any()
    assert (stays | ~protected).all()


@settings(deadline=None, max_examples=60)
@given(st.data(), SIZES, SELECTORS)
def test_segments_cover_every_entry_once(data: Any, size: int, selector: MassSegments) -> None:
    mass, _, filled, _, _ = heads(data, size)
    bounds = {"step": selector.mass_step, "shortest": selector.shortest, "longest": selector.longest}
    found = segments(mass, filled, **bounds)
    assert int(found.max()) < segment_bound(size, **bounds)
    for b in range(2):
        for g in range(2):
            own = mass[b, g][filled[b, g]].tolist()
            assert torch.bincount(found[b, g][filled[b, g]]).tolist() == naive_segments(own, selector)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 12), st.integers(0, 9))
def test_quotas_are_those_of_a_loop(data: Any, count: int, least: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    held = [data.draw(st.integers(0, length)) for length in lengths]
    keep = data.draw(st.integers(sum(held), sum(lengths)))
    # Different numbers, so that no two remainders are the same but for rounding.
    weights = [data.draw(st.sampled_from([0.0, 0.11, 1.0, 3.7])) + 0.001 * index for index in range(1, count + 1)]
    tensors = [torch.tensor([row], dtype=torch.float64) for row in (weights, lengths, held)]
    found = quotas(*tensors, torch.tensor([keep], dtype=torch.float64), least)[0].tolist()
    assert sum(found) == keep
    smallest = min(least, (keep - sum(held)) // count)
    for quota, length, inside in zip(found, lengths, held):
        assert min(max(inside, smallest), length) <= quota <= length
    expected = naive_quotas(weights, lengths, held, keep, least)
    # Remainders that are equal in exact arithmetic may be told apart by rounding, for one entry at most.
    assert max(abs(left - right) for left, right in zip(found, expected)) <= 1
    assert sum(abs(left - right) for left, right in zip(found, expected)) <= 2


def test_within_a_segment_the_best_stay_and_of_equals_the_newer() -> None:
    selector = MassSegments(mass_step=0.5, shortest=1, longest=100, least=0)
    mass = torch.tensor([[[0.2, 0.2, 0.1, 0.25, 0.25]]], dtype=torch.float64)  # two segments: 3 and 2 entries
    scores = torch.tensor([[[5.0, 9.0, 5.0, 1.0, 1.0]]])
    filled, none = torch.ones(1, 1, 5, dtype=torch.bool), torch.zeros(1, 1, 5, dtype=torch.bool)
    stays = selector.chosen(mass, scores, filled, none, torch.tensor([[2]]))
    assert stays[0, 0].tolist() == [False, True, False, False, True]
    protected = torch.tensor([[[True, False, False, False, False]]])
    stays = selector.chosen(mass, scores, filled, protected, torch.tensor([[2]]))
    assert stays[0, 0].tolist() == [True, False, False, False, True]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_no_stretch_takes_everything(model: LlamaForCausalLM) -> None:
    """Where one stretch has the best scores, plain selection keeps only that one."""
    ids = torch.randint(3, 64, (1, 400), generator=torch.Generator().manual_seed(1))
    shares = {}
    for selector in ("snapkv", "ams"):
        cache = HeadKVCache(model, "streaming", budget=80, selector=selector)  # scores by recency
        model(ids, past_key_values=cache)
        kept = torch.cat([head for layer in range(2) for head in cache.kept_positions(layer)[0]])
        assert len(kept) == 2 * 2 * 80
        shares[selector] = float(((kept >= 4) & (kept < 300)).float().mean())
    assert shares["snapkv"] == 0.0
    assert shares["ams"] > 0.3


@torch.no_grad()
def test_the_credit_goes_along_with_its_entries(model: LlamaForCausalLM) -> None:
    cache = HeadKVCache(model, "ams", budget=40, interval=8)
    model(torch.randint(3, 64, (2, 100), generator=torch.Generator().manual_seed(2)), past_key_values=cache)
    store = cache.compressed_layers[0].store
    assert store is not None and store.credit is not None
    before = dict(zip(zip(store.row_of_slots().tolist(), store.positions.tolist()), store.credit.tolist()))
    assert all(credit > 0 for (_, position), credit in before.items() if position >= 0)
    order = torch.tensor([1, 0])
    cache.batch_select_indices(order)
    store = cache.compressed_layers[0].store
    assert store is not None and store.credit is not None
    for g in range(2):
        start, length = int(store.start[0, g]), int(store.length[0, g])
        assert length == 40 and bool((store.credit[start : start + length] > 0).all())
    for token in range(8):
        model(torch.full((2, 1), 5 + token), past_key_values=cache)
    store = cache.compressed_layers[0].store
    assert store is not None and store.credit is not None
    assert bool((store.credit[store.positions < 0] == 0).all())  # what is empty has none
    assert bool((store.credit[store.positions >= 0] > 0).all())


def test_not_with_a_budget_over_all_layers(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="use scope='layer', or another selector"):
        HeadKVCache(model, "adakv", budget=40, scope="model", selector="ams")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass_step": 0.0}, r"mass_step must lie in \(0, 1\]"),
        ({"longest": 8}, r"longest \(8\) must be at least shortest \(32\)"),
        ({"least": -1}, "least must be a whole number, 0 or more"),
        ({"neighbours": 4}, "neighbours must be an odd number"),
        ({"credit": 1.5}, r"credit must lie in \[0, 1\]"),
        ({"queries": 0}, "queries must be a whole number of tokens, at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MassSegments(**options)
