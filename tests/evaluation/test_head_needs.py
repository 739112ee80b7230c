# SPDX-License-Identifier: Apache-2.0
"""The oracle, the statistics and the divisions against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.evaluation import labels
from headkv_mm.evaluation.heads.allocations import (
    mean_entries,
    proportional,
    retained,
    retained_if_shuffled,
    water_filled,
)
from headkv_mm.evaluation.heads.attending import RecordedRow, recorded_calls
from headkv_mm.evaluation.heads.needs import entries_needed, future_gains, image_stretches, resampled
from headkv_mm.evaluation.heads.pointed import Behind, pointed_attention
from headkv_mm.evaluation.heads.rankings import LAST_ROW, scores_before, value_sizes
from headkv_mm.evaluation.heads.ranks import spearman, spearman_within
from headkv_mm.evaluation.heads.statistics import Seen, backward_tokens, best_entries, early_need, statistics
from headkv_mm.evaluation.prompts import encode
from headkv_mm.evaluation.text.recording import Recording
from headkv_mm.output_projections import OutputProjections

ROW, GROUPS, GROUP = 16, 2, 2


@pytest.fixture(scope="module")
def recorded(model: Any) -> tuple[list[RecordedRow], list[Tensor], list[Tensor]]:
    """The layers of one padded caption; its attention maps [H, T, T] and Gram matrices [G, R, D, D] by layer."""
    prompts = encode(model, [caption(scene) for scene in unseen_scenes(2, 5)])
    tokens = torch.randint(369, (2, 256), generator=torch.Generator().manual_seed(0))
    ids, mask = torch.cat((prompts.ids, tokens), 1), torch.cat((prompts.mask, torch.ones_like(tokens)), 1)
    recording = Recording(model)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=recording, use_cache=True)
        model.set_attn_implementation("eager")
        maps = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    seen = mask[1].bool()
    condition = int(prompts.mask[1].sum())
    assert condition < prompts.ids.shape[1], "the caption should be padded"
    layers = [RecordedRow.of(call, 1, seen, condition) for call in recorded_calls(recording)]
    projections = OutputProjections(model)
    grams = [projections.grams(index, 8).unflatten(0, (GROUPS, GROUP)) for index in range(len(layers))]
    return layers, [one[1][:, seen][:, :, seen] for one in maps], grams


def test_attention_is_that_of_the_model(recorded: Any) -> None:
    layers, maps, _ = recorded
    for layer, expected in zip(layers, maps, strict=True):
        found = layer.attention(40, 150).flatten(0, 1)
        torch.testing.assert_close(found, expected[:, 40:150, :150], atol=1e-5, rtol=1e-4)
        mean = expected[:, 40:150, :150].mean(1).unflatten(0, (GROUPS, GROUP)).mean(1)
        torch.testing.assert_close(layer.mass(40, 150), mean, atol=1e-5, rtol=1e-4)


def test_the_oracle_is_that_of_plain_loops(recorded: Any) -> None:
    layers, maps, _ = recorded
    for layer, attention in zip(layers, maps, strict=True):
        first = layer.first
        stretches = image_stretches(first, ROW, 16, 13)
        assert stretches == [(first + row * ROW, first + (row + 1) * ROW) for row in (13, 14, 15)]
        scores = [{LAST_ROW: layer.mass(begin - ROW, begin)[:, first:]} for begin, _ in stretches]
        future = future_gains(layer, stretches, scores)
        end = first + 256
        for head in range(GROUPS):
            for keep in (0, 1, 7, 60, 240):
                by_best, by_past = 0.0, 0.0
                for begin, _ in stretches:
                    members = attention[head * GROUP : (head + 1) * GROUP].double()
                    later = [float(members[:, begin:end, entry].mean()) for entry in range(first, begin)]
                    past = [float(members[:, begin - ROW : begin, entry].mean()) for entry in range(first, begin)]
                    ranking = sorted(range(len(past)), key=lambda entry: -past[entry])[:keep]
                    by_best += sum(sorted(later, reverse=True)[:keep]) / len(stretches)
                    by_past += sum(later[entry] for entry in ranking) / len(stretches)
                assert float(future.best[head, :keep].sum()) == pytest.approx(by_best, abs=2e-5)
                assert float(future.ranked[LAST_ROW][head, :keep].sum()) == pytest.approx(by_past, abs=2e-5)
        assert bool((future.best.diff(dim=-1) <= 0).all())


def test_statistics_are_those_of_plain_loops(model: Any, recorded: Any) -> None:
    layers, maps, grams = recorded
    for layer, attention, gram, block in zip(layers, maps, grams, model.model.language_model.layers, strict=True):
        first, end = layer.first, layer.first + 4 * ROW
        behind = Behind(queries=ROW, window=ROW, first=first)
        seen = Seen.at(layer, end=end, row=ROW, sizes=value_sizes(layer, gram), behind=behind)
        found = statistics(seen)
        weight = block.self_attn.o_proj.weight.T.unflatten(0, (GROUPS * GROUP, -1))  # [H, D, hidden]
        for head in range(GROUPS):
            members = range(head * GROUP, (head + 1) * GROUP)
            rows = attention[list(members), end - ROW : end, :end].double()
            mass = rows.mean((0, 1))[first:].tolist()
            image = rows[..., first:] / rows[..., first:].sum(-1, keepdim=True)
            own = image.mean((0, 1)).tolist()
            kept = 1 - sum(mass)
            one = {name: float(values[head]) for name, values in found.items()}
            count, held = 0, 0.0
            while held < 0.9:
                count += 1
                held += own[-count]
            assert one["backward tokens, tau 0.9, 1 row"] == count
            count, held = 0, kept
            while held < 0.9:
                count += 1
                held += mass[-count]
            assert one["backward tokens, tau 0.9, 1 row, condition held"] == count
            count, held = 0, kept
            while held < 0.95:
                held += sorted(mass, reverse=True)[count]
                count += 1
            assert one["best entries, tau 0.95, 1 row"] == count == float(early_need(found)[head])
            entropy = -sum(share * torch.tensor(share).log().item() for share in own if share > 0)
            assert one["entropy (as effective entries)"] == pytest.approx(2.718281828**entropy, rel=1e-3)
            assert one["attention outside the condition"] == pytest.approx(1 - kept, abs=1e-5)
            distance = sum(share * (len(own) - 1 - entry) for entry, share in enumerate(own))
            assert one["mean distance"] == pytest.approx(distance, rel=1e-4)
            assert one["attention beyond the last row"] == pytest.approx(sum(own[:-ROW]), abs=1e-5)
            outside = sum(sorted(mass, reverse=True)[len(mass) // 8 :])
            assert one["attention outside the best 1/8 of the entries"] == pytest.approx(outside, abs=1e-5)
            squares = 0.0
            for query in range(end - ROW, end):
                far = attention[list(members), query, first : query + 1 - ROW].double().mean(0)
                squares += float(far.square().sum()) / ROW
            assert one["pointed attention"] == pytest.approx(squares, rel=1e-3)
            size = 0.0
            for place, member in enumerate(members):
                norms = (layer.values[head, first:end] @ weight[member].detach()).norm(dim=-1)  # [n]
                size += float((rows[place].mean(0)[first:] * norms).sum()) / GROUP
            assert one["attention times size of the projected value"] == pytest.approx(size, rel=1e-4)


def test_backward_tokens_are_those_by_which_headkv_labels(model: Any) -> None:
    prompts = encode(model, [caption(scene) for scene in unseen_scenes(2, 5)])
    tokens = torch.randint(369, (2, 256), generator=torch.Generator().manual_seed(0))
    twin = labels.watching_copy(model)
    expected = labels.tokens_needed(twin, prompts, tokens, [4], row=ROW, taus=(0.8, 0.9))[4]
    recording = Recording(model)
    ids, mask = torch.cat((prompts.ids, tokens), 1), torch.cat((prompts.mask, torch.ones_like(tokens)), 1)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=recording, use_cache=True)
    for index in range(2):
        condition = int(prompts.mask[index].sum())
        for layer, call in enumerate(recorded_calls(recording)):
            end = condition + 4 * ROW
            own = RecordedRow.of(call, index, mask[index].bool(), condition).own_mass(end - ROW, end)
            for place, tau in enumerate((0.8, 0.9)):
                assert backward_tokens(own, tau).tolist() == expected[layer, index, :, place].tolist()


def test_sinks_and_softcap_change_the_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys = torch.randn(1, 2, 5, 4, generator=generator), torch.randn(1, 5, 4, generator=generator)
    sinks = torch.tensor([[0.5, -1.0]])
    layer = RecordedRow(query, keys, keys, 0.7, 2.0, sinks, 0)
    found = layer.attention(4, 5)[0, 1, 0]
    logits = [2.0 * float(torch.tanh(query[0, 1, 4] @ keys[0, entry] * 0.7 / 2.0)) for entry in range(5)]
    below = sum(torch.tensor([*logits, -1.0]).exp().tolist())
    assert found.tolist() == pytest.approx((torch.tensor(logits).exp() / below).tolist(), rel=1e-5)


def test_every_query_has_its_own_window_and_the_first_entries_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys = torch.randn(1, 2, 90, 4, generator=generator), torch.randn(1, 90, 4, generator=generator)
    layer = RecordedRow(query, keys, keys, 0.5, 0.0, None, 0)
    attention = layer.attention(0, 90).double().mean(1)[0]  # [90, 90]
    for count in (1, 70, 90):  # more than are read together, too
        expected = sum(float(attention[at, 3 : max(at - 4, 3)].square().sum()) for at in range(90 - count, 90)) / count
        found = pointed_attention(layer, 90, Behind(queries=count, window=5, first=3))
        assert found.tolist() == pytest.approx([expected], rel=1e-4)
    # One entry that gets everything counts more than many that share it.
    sharp = RecordedRow(10 * query, keys, keys, 0.5, 0.0, None, 0)
    behind = Behind(queries=70, window=5, first=3)
    assert float(pointed_attention(sharp, 90, behind)) > 2 * float(pointed_attention(layer, 90, behind))
    # There may be fewer queries than are asked for, and then none with anything behind its window.
    assert float(pointed_attention(layer, 4, Behind(queries=64, window=8, first=0))) == 0


def test_counting_stops_when_the_share_is_reached() -> None:
    attention = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.0, 0.0, 0.0, 0.0]])
    assert backward_tokens(attention[:1], 0.3).tolist() == [2]
    assert backward_tokens(attention[:1], 0.375).tolist() == [2]  # exactly that share
    assert best_entries(attention[:1], 0.6).tolist() == [2]
    assert best_entries(attention, 0.6, torch.tensor([[3.0], [1.0]])).tolist() == [0, 0]
    gains = torch.tensor([[0.5, 0.25, 0.25], [0.03125, 0.0, 0.0]])
    assert entries_needed(gains, 0.95).tolist() == [3, 0]
    assert entries_needed(gains, 0.75).tolist() == [2, 0]


falling = st.lists(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), min_size=2, max_size=4)


@given(values=falling, mean=st.integers(1, 6), share=st.floats(0, 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_division_beats_water_filling(values: Any, mean: int, share: float, data: st.DataObject) -> None:
    gains = torch.tensor(values, dtype=torch.float64).sort(-1, descending=True).values[None]
    heads, floor = gains.shape[1], round(share * mean)
    best = water_filled(gains, mean=mean, floor=floor)
    weights = data.draw(st.lists(st.floats(0, 100), min_size=heads, max_size=heads))
    other = proportional(torch.tensor([weights]), mean=mean, floor=floor, limit=6)
    for targets in (best, other):
        assert int(targets.sum()) == mean * heads
        assert int(targets.min()) >= floor
        assert int(targets.max()) <= 6
    assert retained(gains, best) >= retained(gains, other) - 1e-12
    assert retained(gains, best) >= retained(gains, torch.full_like(best, mean)) - 1e-12
    assert retained(gains, best) >= retained_if_shuffled(gains, best) - 1e-12


def test_shuffling_is_the_mean_over_all_permutations() -> None:
    from itertools import permutations

    gains = torch.tensor([[[0.5, 0.2, 0.1], [0.3, 0.3, 0.0], [0.9, 0.05, 0.0]]])
    targets = torch.tensor([[2, 0, 1]])
    every = [retained(gains, torch.tensor([order])) for order in permutations(targets[0].tolist())]
    assert retained_if_shuffled(gains, targets) == pytest.approx(sum(every) / len(every))
    assert retained(gains, targets) == pytest.approx(1 - (0.1 + 0.6 + 0.05) / 3)


@given(count=st.integers(1, 40), other=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_curves_keep_their_form_over_another_number_of_entries(count: int, other: int, seed: int) -> None:
    gains = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).sort(-1, descending=True).values
    found = resampled(gains, other)
    assert found.shape == (2, other)
    assert bool((found.diff(dim=-1) <= 0).all())
    torch.testing.assert_close(found.sum(-1), gains.double().sum(-1))
    if other % count == 0:
        torch.testing.assert_close(resampled(found, count), gains.double())


def test_budgets_are_shares_or_entries() -> None:
    assert mean_entries(1 / 8, 256, 240) == 32
    assert mean_entries(64, 256, 240) == 64
    assert mean_entries(1.0, 256, 240) == 240
    assert mean_entries(0.001, 256, 240) == 1


def test_rank_correlation() -> None:
    right = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(torch.tensor([10.0, 20.0, 30.0, 99.0]), right) == pytest.approx(1)
    assert spearman(-right, right) == pytest.approx(-1)
    assert spearman(torch.ones(4), right) == 0
    assert spearman(right, torch.ones(4)) is None
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand 4.5 / sqrt(4.5 * 5).
    assert spearman(torch.tensor([0.0, 5.0, 5.0, 7.0]), right) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    left = torch.stack([right, -right, right])
    needs = torch.stack([right, right, torch.ones(4)])
    assert spearman_within(left, needs) == pytest.approx(0)
    assert spearman_within(left[2:], needs[2:]) is None


def test_rankings_are_those_of_plain_loops(recorded: Any) -> None:
    layers, maps, grams = recorded
    layer, attention, sizes = layers[1], maps[1].double(), value_sizes(layers[1], grams[1])
    first = layer.first
    stretches = image_stretches(first, ROW, 16, 14)
    every = list(scores_before(layer, stretches, ROW, sizes))
    for (begin, _), scores in zip(stretches, every, strict=True):
        for head in range(GROUPS):
            members = [head * GROUP + member for member in range(GROUP)]
            unit = [key / key.norm() for key in layer.keys[head, first:begin]]
            anchor = torch.stack(unit).mean(0)
            anchor = anchor / anchor.norm()
            for entry in (first, first + 100, begin - 3):
                one = {name: float(values[head, entry - first]) for name, values in scores.items()}
                last = attention[members, begin - ROW : begin, entry]
                assert one[LAST_ROW] == pytest.approx(float(last.mean()), abs=1e-5)
                two = attention[members, begin - 2 * ROW : begin, entry]
                assert one["attention of the last two rows"] == pytest.approx(float(two.mean()), abs=1e-5)
                added = attention[members, first:begin, entry]
                assert one["all attention so far"] == pytest.approx(float(added.mean(0).sum()), abs=1e-4)
                valued = sum(float(last[place].mean() * sizes[head, place, entry]) for place in range(GROUP)) / GROUP
                name = "attention of the last row times size of the projected value"
                assert one[name] == pytest.approx(valued, rel=1e-3, abs=1e-5)
                logits = {
                    (member, query): float(layer.query[head, member, query] @ layer.keys[head, entry])
                    for member in range(GROUP)
                    for query in range(begin - ROW, begin)
                }
                mean = sum(logits.values()) / len(logits)
                assert one["mean logit of the last row"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
                most = max(logit for (_, query), logit in logits.items() if query >= entry) * layer.scale
                assert one["largest logit of the last row"] == pytest.approx(most, rel=1e-3, abs=1e-4)
                spread = sum(
                    torch.tensor([logits[member, query] * layer.scale for query in range(begin - ROW, begin)])
                    .double()
                    .std(correction=0)
                    .item()
                    for member in range(GROUP)
                )
                assert one["spread of the last row's logits"] == pytest.approx(spread / GROUP, rel=1e-3, abs=1e-5)
                most = float(last.max())
                assert one["largest attention of a query of the last row"] == pytest.approx(most, rel=1e-3, abs=1e-5)
                assert one["keys unlike the others"] == pytest.approx(-float(unit[entry - first] @ anchor), abs=1e-5)
                assert one["newest"] == entry - first
