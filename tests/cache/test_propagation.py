# SPDX-License-Identifier: Apache-2.0
"""fastkv: tokens that go on after one layer, against layers that are run by hand and against a masked full cache."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import sdpa_mask

from headkv_mm import HeadKVCache, ImageGrid, compress
from headkv_mm.propagation import best_columns
from headkv_mm.schedules import TokenSelective
from headkv_mm.text_plan import text_plan

from . import naive_selection as naive

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {}}
LAYER, WINDOW = 1, 8
ALL = {"tsp_least": 0}
"""Choose among the tokens of short texts too."""
LENGTHS = (43, 57, 60)


def build(family: str, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def model() -> Any:
    return build("Llama")


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Three prompts of 43, 57 and 60 tokens, left padded."""
    ids = torch.randint(6, 120, (3, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : 60 - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def hooks(model: Any) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.model.layers)


def forward(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens `ids` [B, T]; `mask` [B, seen + T] covers everything."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def chosen(logits: Tensor) -> list[list[int]]:
    """The columns of a forward that reached the end, row by row."""
    return [(~row.isnan().any(-1)).nonzero()[:, 0].tolist() for row in logits]


def by_hand(model: Any, ids: Tensor, choose: Callable[[naive.Observation], set[int]]) -> tuple[Any, list[int], Tensor]:
    """Run the layers one by one over one row of tokens, [1, T]; only what `choose` says goes on after one of them.

    Returns:
        What every layer saw, the positions that went on, and the logits of those [1, S, V].
    """
    core, places = model.model, torch.arange(ids.shape[1])
    hidden, maps, going = core.embed_tokens(ids), [], places.tolist()
    for index, block in enumerate(core.layers):
        mask = torch.full((len(places), len(places)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
        output, weights = block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=core.rotary_emb(hidden, places[None]),
            attention_mask=mask[None, None],
        )
        hidden = hidden + output
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        maps.append(naive.Observation([weights[0].tolist()], [torch.empty(COMMON["num_key_value_heads"])]))
        if index == LAYER:
            going = sorted(choose(maps[-1]))
            hidden, places = hidden[:, going], places[going]
    return maps, going, model.lm_head(core.norm(hidden))


def most_salient(seen: naive.Observation, count: int, sinks: int) -> set[int]:
    heads = [naive.snapkv_scores(seen, 0, head, WINDOW) for head in range(seen.kv_heads)]
    saliency = naive.single([sum(scores) for scores in zip(*heads, strict=True)])
    return naive.best(saliency, count - sinks - WINDOW, sinks, WINDOW)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tokens", "budget", "ratio"), [(90, 0.15, 0.3), (61, 20, 0.5), (130, 12, 0.2)], ids=str)
def test_layers_run_by_hand_choose_and_keep_the_same(family: str, tokens: int, budget: Any, ratio: float) -> None:
    model = build(family, "eager").double()
    ids = torch.randint(3, 120, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    entries = budget if isinstance(budget, int) else round(budget * tokens)
    first, last = naive.sinks_and_window(entries, tokens, window=WINDOW)
    count = max(round(ratio * tokens), entries, first + WINDOW)
    with torch.no_grad():
        maps, going, expected = by_hand(model, ids, lambda seen: most_salient(seen, count, first))
    cache = HeadKVCache(model, "fastkv", budget=budget, tsp_ratio=ratio, tsp_layer=LAYER, **ALL)
    logits = forward(model, cache, ids, torch.ones_like(ids))
    assert chosen(logits) == [going]
    assert len(going) == count
    assert (logits[:, going] - expected).abs().max() < 1e-5  # the softmax is in float32
    for layer, seen in enumerate(maps):
        places = list(range(tokens)) if layer <= LAYER else going
        # Sinks are positions, and all of them go on.
        for head, kept in enumerate(cache.kept_positions(layer)[0]):
            scores = naive.snapkv_scores(seen, 0, head, WINDOW)
            best = naive.best(scores, entries - first - last, first, last)
            assert kept.tolist() == sorted(places[at] for at in best)


@pytest.fixture
def masked(model: Any) -> Callable[..., Tensor]:
    """Logits of a full cache of which every layer, row and head may see the given positions only."""
    state: dict[str, Any] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> Any:
        heads, tokens, columns = query.shape[1], query.shape[2], key.shape[2]
        group = heads // key.shape[1]
        if mask is None:
            mask = torch.ones(1, 1, tokens, columns, dtype=torch.bool).tril(columns - tokens)
        allowed = mask.expand(len(query), heads, tokens, columns).clone()
        for row, kept in enumerate(state["visible"][module.layer_idx]):
            for head, positions in enumerate(kept):
                seen = torch.zeros(columns, dtype=torch.bool)
                seen[[state["columns"][row][at] for at in positions]] = True
                allowed[row, head * group : (head + 1) * group] &= seen
        logits = query @ key.repeat_interleave(group, 1).mT * how["scaling"]
        weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked", attention)
    AttentionMaskInterface.register("masked", sdpa_mask)

    def run(cache: Any, ids: Tensor, mask: Tensor, visible: Any) -> Tensor:
        before = model.config._attn_implementation
        state.update(visible=visible, columns=[row.nonzero()[:, 0].tolist() for row in mask])
        model.set_attn_implementation("masked")
        try:
            return forward(model, cache, ids, mask)
        finally:
            model.set_attn_implementation(before)

    return run


def follow(
    model: Any, masked: Any, cache: Any, oracle: Any, ids: Tensor, mask: Tensor, tokens: int, *, every: bool = False
) -> list[list[int]]:
    """Give `tokens` of `ids` [B, T] to the cache and to the oracle, compare their logits, say which went on."""
    seen = cache.get_seq_length()
    step, before = ids[:, seen : seen + tokens], mask[:, :seen].sum(-1).tolist()
    kept = [cache.kept_positions(layer) or [[torch.empty(0)] * 3] * len(ids) for layer in range(len(cache))]
    logits = forward(model, cache, step, mask[:, : seen + tokens])
    going, visible = chosen(logits), []
    for layer, rows in enumerate(kept):
        visible.append([])
        for row, heads in enumerate(rows):
            columns = range(tokens) if layer <= cache.propagation.layer else going[row]
            place = (mask[row, seen : seen + tokens].cumsum(-1) - 1).tolist()
            new = [before[row] + place[column] for column in columns if mask[row, seen + column]]
            visible[-1].append([[*(int(at) for at in head.tolist()), *new] for head in heads])
    expected = masked(oracle, step, mask[:, : seen + tokens], visible)
    for row, columns in enumerate(going):
        real = [column for column in columns if mask[row, seen + column]]
        assert real[-1] == tokens - 1
        assert (logits[row, real] - expected[row, real]).abs().max() < 1e-4
    return going


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{"budget": 14, "interval": 7}, {"budget": 0.2}], ids=str)
def test_a_masked_full_cache_says_the_same(model: Any, inputs, masked, implementation: str, settings) -> None:
    """A padded batch: prompt, decoded tokens, a long turn, decoded tokens, a short turn."""
    model.set_attn_implementation(implementation)
    cache = HeadKVCache(model, "fastkv", **settings, **ALL)
    oracle = DynamicCache(config=model.config)
    more = torch.randint(6, 120, (3, 90), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    going = [follow(model, masked, cache, oracle, ids, mask, tokens) for tokens in (60, *[1] * 20, 30, *[1] * 9, 3)]
    entries = [settings["budget"] if isinstance(settings["budget"], int) else round(0.2 * n) for n in LENGTHS]
    assert [len(row) for row in going[0]] == [
        max(round(0.2 * n), kept, min(kept // 4, 4) + WINDOW) for n, kept in zip(LENGTHS, entries, strict=True)
    ]
    assert [len(row) for row in going[21]] == [WINDOW] * 3
    assert [len(row) for row in going[-1]] == [3] * 3
    assert cache.get_seq_length() == sum((60, 20, 30, 9, 3))
    assert cache.nbytes_full == oracle.layers[0].keys.nbytes * 2 * 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chunks_of_a_reading_are_chosen_from_one_by_one(model: Any, inputs, masked, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    cache, oracle = HeadKVCache(model, "fastkv", budget=0.2, **ALL), DynamicCache(config=model.config)
    ids = torch.cat([inputs["input_ids"]] * 2, 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["input_ids"])], 1)
    with cache.reading():
        going = [follow(model, masked, cache, oracle, ids, mask, tokens) for tokens in (40, 33, 9, 1)]
        dense = cache.layers[-1].keys.shape[2]
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)
    assert dense == sum(max(map(len, row)) for row in going)
    for row, length in enumerate(LENGTHS):
        entries = round(0.2 * (length + 23))
        for layer in range(len(cache)):
            for head in cache.kept_positions(layer)[row]:
                assert len(head) == entries
                assert head[-1] == length + 22
    follow(model, masked, cache, oracle, ids, mask, 1)
    follow(model, masked, cache, oracle, ids, mask, 20)


def test_a_row_of_a_batch_is_the_text_alone(model: Any, inputs) -> None:
    more = torch.randint(6, 120, (3, 70), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    steps, together = (60, 1, 40, *[1] * 12), HeadKVCache(model, "fastkv", budget=0.25, interval=5, **ALL)
    alone = [HeadKVCache(model, "fastkv", budget=0.25, interval=5, **ALL) for _ in LENGTHS]
    for step in steps:
        seen = together.get_seq_length()
        both = forward(model, together, ids[:, seen : seen + step], mask[:, : seen + step])
        for row, length in enumerate(LENGTHS):
            first = 60 - length
            part = slice(max(seen, first), seen + step)
            one = forward(model, alone[row], ids[row : row + 1, part], mask[row : row + 1, first : seen + step])
            real = both[row : row + 1, -one.shape[1] :]
            assert chosen(one) == chosen(real)
            assert (one - real).nan_to_num(0.0).abs().max() < 1e-4
    for layer in range(4):
        assert [str(rows) for rows in together.kept_positions(layer)] == [
            str(cache.kept_positions(layer)[0]) for cache in alone
        ]


def test_right_padding_is_no_content_either(model: Any, inputs) -> None:
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(-3), mask[1].roll(-3)
    cache, alone = (HeadKVCache(model, "fastkv", budget=12, **ALL) for _ in range(2))
    padded, whole = forward(model, cache, ids, mask), forward(model, alone, ids[1:2, :57], mask[1:2, :57])
    assert (padded[1, :57] - whole[0]).nan_to_num(0.0).abs().max() < 1e-4
    for layer in range(4):
        assert str(cache.kept_positions(layer)[1]) == str(alone.kept_positions(layer)[0])


def test_all_tokens_going_on_is_snapkv(model: Any, inputs) -> None:
    def run(method: str, **options: Any) -> tuple[Tensor, str]:
        cache = HeadKVCache(model, method, budget=20, interval=5, window=8, **options)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=20,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(output.logits), str([cache.kept_positions(layer) for layer in range(4)])

    expected, kept = run("snapkv")
    for options in ({"tsp_ratio": 1.0, **ALL}, {"tsp_layer": 3, **ALL}, {}):  # the last: 60 tokens are few
        logits, same = run("fastkv", **options)
        assert torch.equal(logits, expected)
        assert same == kept
    assert not torch.equal(run("fastkv", **ALL)[0], expected)


def test_a_budget_of_everything_is_the_stock_cache_bit_for_bit(model: Any, inputs) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    stock = forward(model, DynamicCache(config=model.config), ids, mask)
    assert torch.equal(forward(model, HeadKVCache(model, "fastkv", budget=1.0, **ALL), ids, mask), stock)
    assert torch.equal(forward(model, HeadKVCache(model, "fastkv", budget=60, **ALL), ids, mask), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_inside_compress_is_that_with_a_cache(family: str, inputs) -> None:
    model = build(family)
    cache = HeadKVCache(model, "fastkv", budget=0.2, **ALL)
    expected = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    del cache
    gc.collect()
    assert hooks(model) == 0
    with compress(model, "fastkv", budget=0.2, **ALL) as session:
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
        beams = model.generate(**inputs, max_new_tokens=5, num_beams=2, num_return_sequences=2, do_sample=False)
        assert beams.shape == (6, 65)
        assert hooks(model) > 0
    assert hooks(model) == 0
    assert session.report().tokens_seen == 64


def test_hooks_go_when_they_are_needed_no_more(model: Any, inputs) -> None:
    held: list[Any] = []

    def fail_inside() -> None:
        with compress(model, "fastkv", budget=0.2, **ALL) as session:
            model.generate(**inputs, max_new_tokens=2)
            held.extend(session.caches)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert hooks(model) == 0
    first, second = (HeadKVCache(model, "fastkv", budget=0.2, **ALL) for _ in range(2))
    once = hooks(model)
    third = first.copy()
    assert hooks(model) == once == 4 + 1
    copy.deepcopy(second)
    del first, second
    gc.collect()
    assert hooks(model) == once
    # Other caches go through hooked layers as if nothing was there.
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain = forward(model, HeadKVCache(model, "snapkv", budget=20), ids, mask)
    assert torch.equal(plain, forward(model, DynamicCache(config=model.config), ids, mask))
    del third
    gc.collect()
    assert hooks(model) == 0


def test_without_hooks_nothing_runs_as_something_else(model: Any, inputs) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = HeadKVCache(model, "fastkv", budget=0.2, **ALL)
    forward(model, cache, ids, mask)
    cache.detach()
    ones = torch.ones_like(ids)
    forward(model, cache, ids[:, :1], torch.cat([mask, ones[:, :1]], 1))  # decoding needs none
    with pytest.raises(RuntimeError, match="layers are not hooked up to this cache"):
        forward(model, cache, ids, torch.cat([mask, ones[:, :1], ones], 1))


def test_a_copy_that_keeps_everything_lets_everything_go_on(model: Any, inputs) -> None:
    cache = HeadKVCache(model, "fastkv", budget=0.2, **ALL)
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    turn = torch.randint(6, 120, (3, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turn)], 1)
    at_once = forward(model, cache.copy(evict=False), turn, mask)
    slow = cache.copy(evict=False)
    one_by_one = [forward(model, slow, turn[:, at : at + 1], mask[:, : 60 + at + 1]) for at in range(30)]
    assert (torch.cat(one_by_one, 1) - at_once).abs().max() < 1e-4
    assert [len(row) for row in chosen(forward(model, cache.copy(), turn, mask))] == [WINDOW] * 3


def test_saved_and_loaded_it_goes_on_as_before(model: Any, inputs, tmp_path) -> None:
    cache = HeadKVCache(model, "fastkv", budget=0.2, **ALL)
    forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    cache.save(tmp_path / "text.kv", model)
    loaded = HeadKVCache.load(tmp_path / "text.kv", model)
    ids = torch.randint(6, 120, (3, 80), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    for first, last in ((0, 40), *((at, at + 1) for at in range(40, 80))):
        expected = forward(model, cache, ids[:, first:last], mask[:, : 60 + last])
        got = forward(model, loaded, ids[:, first:last], mask[:, : 60 + last])
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    with pytest.raises(ValueError, match="evicted"):
        loaded.crop(-1)


@pytest.mark.parametrize("scorer", ["keydiff", "h2o", "tova"])
@pytest.mark.parametrize("allocator", ["snapkv", "adakv", "pyramidkv"])
def test_other_scorers_and_allocators(model: Any, inputs, masked, scorer: str, allocator: str) -> None:
    cache = HeadKVCache(model, "fastkv", budget=0.2, scorer=scorer, allocator=allocator, **ALL)
    oracle = DynamicCache(config=model.config)
    ids = torch.cat([inputs["input_ids"]] * 2, 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["input_ids"])], 1)
    for tokens in (60, 1, 30, 1):
        follow(model, masked, cache, oracle, ids, mask, tokens)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=4), st.data(), st.integers(1, 7)
)
@settings(max_examples=50)
def test_the_best_columns_in_order_and_of_equal_ones_the_newer(rows: list[list[int]], data: Any, width: int) -> None:
    counts = [data.draw(st.integers(1, width)) for _ in rows]
    found = best_columns(torch.tensor(rows).float(), torch.tensor(counts)[:, None], width)
    for row, count, columns in zip(rows, counts, found.tolist(), strict=True):
        best = sorted(range(7), key=lambda at: (row[at], at))[7 - count :]
        assert columns == [-1] * (width - count) + sorted(best)


@given(
    budget=st.one_of(st.integers(8, 200), st.floats(0.01, 0.99)),
    before=st.integers(0, 300),
    tokens=st.integers(1, 300),
    ratio=st.floats(0.01, 1.0),
    least=st.integers(0, 80),
)
@settings(max_examples=200)
def test_as_many_go_on_as_budgets_need(budget: Any, before: int, tokens: int, ratio: float, least: int) -> None:
    plan, schedule = text_plan(budget), TokenSelective(tsp_ratio=ratio, tsp_least=least, tsp_layer=0)
    passing = schedule.passing(plan, before, tokens)
    assert min(tokens, max(least, schedule.window, round(ratio * tokens))) <= passing <= tokens
    held = min(plan.entries(before), before)
    assert held + passing >= min(plan.entries(before + tokens), held + tokens)
    if passing < tokens:
        assert before + tokens > plan.entries(before + tokens)  # something is evicted in every layer


def test_what_cannot_work_is_refused_in_one_line(model: Any) -> None:
    with pytest.raises(ValueError, match="needs the model and not only its configuration"):
        HeadKVCache(model.config, "fastkv")
    with pytest.raises(ValueError, match="tsp_layer 4 is outside the model, whose layers are 0 to 3"):
        HeadKVCache(model, "fastkv", tsp_layer=4)
    for options, message in (
        ({"tsp_layer": -1}, "tsp_layer must be a whole number, at least 0"),
        ({"tsp_ratio": 0.0}, "tsp_ratio must be a share in"),
        ({"tsp_least": 1.5}, "tsp_least must be a whole number"),
        ({"window": 0}, "window must be a whole number"),
        ({"tsp_layer": 1, "table": "a.json"}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadKVCache(model, "fastkv", **options)
    sliding = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    gemma = AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**{**COMMON, **sliding}))
    with pytest.raises(ValueError, match="has layers of other kinds"):
        HeadKVCache(gemma, "fastkv")
    gpt2 = AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="has no list of decoder layers that take"):
        HeadKVCache(gpt2, "fastkv")
    with pytest.raises(ValueError, match="an image is written token by token"):
        HeadKVCache(model, "snapkv", image_grid=ImageGrid(8, 8), schedule=TokenSelective())
    for training in (True, False):
        model.train(training)
        with pytest.raises(RuntimeError, match="is for inference"):
            model(torch.ones(1, 90, dtype=torch.long), past_key_values=HeadKVCache(model, "fastkv"))
