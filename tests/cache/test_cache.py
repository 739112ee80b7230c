# SPDX-License-Identifier: Apache-2.0
"""HeadKVCache inside a stock model: exactness, memory, batches, and transformers' contract."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from headkv_mm import HeadKVCache, ImageGrid, methods
from headkv_mm.registry import get_method

COMPRESSING = [name for name in methods("image") if name != "none"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in COMPRESSING),
    ("headkv", {"tau": 0.3, "grouping_rows": 3}),
    ("headkv", {"tau": 0.3, "redistribute": False, "grouping_rows": 2}),
    ("headkv", {"tau": 0.3, "score": "softmax", "include_condition": True, "grouping_queries": 1}),
    ("headkv", {"tau": 0.3, "share_labels": True, "strata_ratio": 0.6}),
    ("lines", {"first_eviction_rows": 5, "score": "logits"}),
]


def make(
    model: LlamaForCausalLM, grid: ImageGrid, method: str = "headkv", budget: Any = 0.25, **options: Any
) -> HeadKVCache:
    return HeadKVCache(model, method, budget=budget, image_grid=grid, **options)


@pytest.mark.parametrize("method", methods("image"))
def test_a_full_budget_is_the_stock_cache_bit_for_bit(model, grid, inputs, decode, method) -> None:
    stock = decode(inputs, DynamicCache(config=model.config), 40)
    ours = decode(inputs, make(model, grid, method, budget=1.0), 40)
    assert torch.equal(stock.logits, ours.logits)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_eviction_equals_a_full_cache_with_the_evicted_masked(
    model, grid, inputs, decode, oracle, method, options
) -> None:
    cache = make(model, grid, method, **options)
    run = decode(inputs, cache, 64)
    expected = oracle(inputs, run)
    assert (run.logits - expected).abs().max() < 1e-4
    # The test means something only if entries did leave, and if that changed the logits.
    assert all(len(kept) < 64 for rows in (cache.kept_positions(0), cache.kept_positions(1)) for kept in rows[2])
    full = decode(inputs, DynamicCache(config=model.config), 64, forced=run.tokens).logits
    assert (run.logits - full).abs().max() > 1e-2


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_a_padded_row_equals_the_prompt_alone(model, grid, inputs, decode, method, options) -> None:
    if options.get("share_labels"):
        pytest.skip("shared labels tie the rows of a batch together by definition")
    batch_cache, alone_cache = make(model, grid, method, **options), make(model, grid, method, **options)
    batch = decode(inputs, batch_cache, 64)
    alone = {name: tensor[:1, 7:] for name, tensor in inputs.items()}
    single = decode(alone, alone_cache, 64, forced=batch.tokens[:1])
    assert (batch.logits[0] - single.logits[0]).abs().max() < 1e-4
    for layer in range(2):
        for ours, theirs in zip(
            batch_cache.kept_positions(layer)[0], alone_cache.kept_positions(layer)[0], strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", COMPRESSING)
@pytest.mark.parametrize("budget", [0.25, 16, 0.5])
def test_storage_is_condition_budget_and_one_row(model, grid, inputs, decode, method, budget) -> None:
    cache = make(model, grid, method, budget=budget)
    decode(inputs, cache, 64)
    entries = budget if isinstance(budget, int) else round(budget * 64)
    row_slots = torch.tensor([2 * (prompt + entries + 8) for prompt in (13, 17, 20)])  # two KV heads
    held = []
    for layer in cache.compressed_layers:
        held.append(layer.store.capacity.sum(-1))
        assert layer.store.keys.shape == layer.store.values.shape == (int(held[-1].sum()), 8)
        assert (layer.store.length <= layer.store.capacity).all()
    if method == "pointed":  # the layers together, as one budget is divided among all
        held, row_slots = [torch.stack(held).sum(0)], row_slots * len(held)
    assert all(slots.tolist() == row_slots.tolist() for slots in held)


def test_the_papers_form_stores_less_for_local_heads(model, grid, inputs, decode) -> None:
    cache = make(model, grid, budget=0.5, tau=0.3, redistribute=False)
    decode(inputs, cache, 64)
    types = torch.tensor([[[kind == "local" for kind in row] for row in layer] for layer in cache.report().types])
    assert types.any()
    assert not types.all()
    for layer, local in zip(cache.compressed_layers, types, strict=True):
        prompts = torch.tensor([13, 17, 20])[:, None]
        assert torch.equal(layer.store.capacity.long(), torch.where(local, 16, 32) + prompts + 8)


def test_nbytes_counts_every_tensor_that_the_cache_reaches(model, grid, inputs, decode) -> None:
    cache = make(model, grid)
    for steps in (1, 20, 40):
        cache.reset()
        decode(inputs, cache, steps)
        reached = _tensors_reached(cache)
        assert cache.nbytes == sum(storage.nbytes() for storage in reached.values())
        assert cache.nbytes_peak >= cache.nbytes
    stock = DynamicCache(config=model.config)
    decode(inputs, stock, 40)
    assert cache.nbytes_full == sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)


def _tensors_reached(root: object) -> dict[int, torch.UntypedStorage]:
    found, seen, queue = {}, set(), [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (type, torch.dtype)) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage()
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
        elif isinstance(item, dict):
            queue.extend(item.values())
        else:
            queue.extend(getattr(item, "__dict__", {}).values())
    return found


def test_a_cache_is_freed_with_its_last_reference(model, grid, inputs, decode) -> None:
    import weakref

    cache = make(model, grid)
    decode(inputs, cache, 20)
    keys = weakref.ref(cache.layers[0].store.keys)
    gc.disable()
    try:
        del cache
        assert keys() is None, "something holds the storage in a cycle"
    finally:
        gc.enable()


def test_two_caches_of_one_model_do_not_see_each_other(model, grid, inputs, decode) -> None:
    alone = decode(inputs, make(model, grid), 50)
    first, second = make(model, grid), make(model, grid, "lines")
    # Interleave: a step of one, a step of the other, by decoding a deepcopy between two halves.
    half = decode(inputs, first, 30)
    decode(inputs, second, 50)
    copied = copy.deepcopy(first)
    rest = _continue(model, inputs, copied, half.tokens, alone.tokens[:, 30:])
    assert torch.equal(rest, _continue(model, inputs, first, half.tokens, alone.tokens[:, 30:]))
    assert (rest - alone.logits[:, 30:]).abs().max() < 1e-5


def _continue(model: LlamaForCausalLM, inputs: dict[str, Tensor], cache: Any, before: Tensor, forced: Tensor) -> Tensor:
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(before)], 1)
    positions = mask.sum(-1, keepdim=True) - 1
    ids, logits = before[:, -1:], []
    for step in range(forced.shape[1]):
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits[:, -1])
        ids, positions = forced[:, step : step + 1], positions + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(logits, 1)


def test_chunked_prefill_equals_prefill_at_once(model, grid, decode) -> None:
    ids = torch.randint(6, 120, (2, 20), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole_cache, cache = make(model, grid), make(model, grid)
    whole = decode(inputs, whole_cache, 64)
    with torch.no_grad():
        for piece in (slice(0, 9), slice(9, 15), slice(15, 20)):
            output = model(
                input_ids=ids[:, piece],
                attention_mask=torch.ones_like(ids[:, : piece.stop]),
                position_ids=torch.arange(20)[None, piece].expand(2, -1),
                past_key_values=cache,
            )
    assert (output.logits[:, -1] - whole.logits[:, 0]).abs().max() < 1e-4
    rest = _continue(model, inputs, cache, whole.tokens[:, :1], whole.tokens[:, 1:])
    assert (rest - whole.logits[:, 1:]).abs().max() < 1e-4
    for layer in range(2):
        assert str(whole_cache.kept_positions(layer)) == str(cache.kept_positions(layer))


def test_a_second_turn_attends_to_what_was_kept_and_then_evicts(model, grid, inputs, decode) -> None:
    cache = make(model, grid, "lines", budget=16)
    decode(inputs, cache, 40)
    alone = copy.deepcopy(cache)
    turn = torch.randint(6, 120, (3, 19), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 20 + 39 + 19, dtype=torch.long)
    mask[:, :20] = inputs["attention_mask"]
    first = mask.cumsum(-1)[:, -19:] - 1
    with torch.no_grad():
        logits = model(input_ids=turn, attention_mask=mask, position_ids=first, past_key_values=cache).logits
        # Its first token sees what was kept and itself, as when it is decoded alone (which the oracle proves right).
        expected = model(
            input_ids=turn[:, :1], attention_mask=mask[:, :-18], position_ids=first[:, :1], past_key_values=alone
        ).logits
    assert (logits[:, 0] - expected[:, 0]).abs().max() < 1e-4
    assert cache.get_seq_length() == mask.shape[1]
    for layer in range(2):
        for row, heads in enumerate(cache.kept_positions(layer)):
            prompt = (13, 17, 20)[row]
            for head in heads:
                assert len(head) == prompt + 16
                assert torch.equal(head[:prompt], torch.arange(prompt))
                assert torch.equal(head[-10:], torch.arange(prompt + 58 - 10, prompt + 58))
                assert len(set(head.tolist())) == len(head)
    assert torch.isfinite(logits).all()


def test_multi_token_append_equals_token_by_token_before_eviction(model, grid, inputs, decode) -> None:
    forced = torch.randint(6, 120, (3, 30), generator=torch.Generator().manual_seed(9))
    one = make(model, grid)
    step_by_step = decode(inputs, one, 21, forced=forced)
    many = make(model, grid)
    decode(inputs, many, 6, forced=forced)  # five of the forced tokens went through
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 20, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(
            input_ids=forced[:, 5:20],
            attention_mask=mask,
            position_ids=mask.cumsum(-1)[:, -15:] - 1,
            past_key_values=many,
        ).logits
    assert (logits - step_by_step.logits[:, 6:21]).abs().max() < 1e-4
    for layer in range(2):
        assert str(one.kept_positions(layer)) == str(many.kept_positions(layer))


@pytest.mark.parametrize("method", COMPRESSING)
def test_beams_and_several_sequences(model, grid, inputs, method) -> None:
    def generate(cache: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=30, **kwargs)

    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    sampled = {"num_return_sequences": 2, "do_sample": True}
    for settings in (beams, sampled):
        stock = generate(DynamicCache(config=model.config), **settings)
        # Nothing is evicted within 30 tokens of a budget of 40, but everything goes through the ragged storage.
        rows = "grouping_rows" if "grouping_rows" in get_method(method).options else "first_eviction_rows"
        options = {rows: 5}
        assert torch.equal(stock, generate(make(model, grid, method, budget=40, **options), **settings))
        assert generate(make(model, grid, method, budget=12), **settings).shape == stock.shape


def test_reordered_rows_take_everything_along(model, grid, inputs, decode) -> None:
    cache = make(model, grid, tau=0.3)
    run = decode(inputs, cache, 45)
    order = torch.tensor([2, 0, 0])
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    taken = {name: tensor[order] for name, tensor in inputs.items()}
    forced = torch.randint(6, 120, (3, 15), generator=torch.Generator().manual_seed(2))
    expected = _continue(model, inputs, cache, run.tokens, forced)
    got = _continue(model, taken, moved, run.tokens[order], forced[order])
    assert (got - expected[order]).abs().max() < 1e-5
    assert moved.nbytes != cache.nbytes  # rows of other lengths


def test_repeat_and_select_rows(model, grid, inputs, decode) -> None:
    for method, budget in (("headkv", 0.25), ("none", 1.0)):
        cache = make(model, grid, method, budget=budget)
        decode(inputs, cache, 45)
        one = [cache.kept_positions(layer) for layer in range(2)]
        cache.batch_repeat_interleave(2)
        assert [len(cache.kept_positions(layer)) for layer in range(2)] == [6, 6]
        cache.batch_select_indices(torch.tensor([0, 2, 4]))
        assert str([cache.kept_positions(layer) for layer in range(2)]) == str(one)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        assert str(cache.kept_positions(0)) == str([one[0][0], one[0][2]])


def test_reset_makes_it_new(model, grid, inputs, decode) -> None:
    cache = make(model, grid)
    first = decode(inputs, cache, 50)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert torch.equal(decode(inputs, cache, 50).logits, first.logits)


def test_crop_works_before_eviction_and_is_refused_after(model, grid, inputs, decode) -> None:
    cache = make(model, grid, "lines", budget=32)
    run = decode(inputs, cache, 20)
    cache.crop(-6)
    assert cache.get_seq_length() == 20 + 19 - 6
    rest = _continue(model, inputs, cache, run.tokens[:, :14], run.tokens[:, 14:20])
    assert (rest - run.logits[:, 14:20]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="follow the prompt"):
        cache.crop(-30)
    decode(inputs, evicted := make(model, grid, budget=16), 60)
    with pytest.raises(ValueError, match="evicted"):
        evicted.crop(-1)


def test_a_budget_in_bytes_holds_at_most_those_bytes(model, grid, inputs, decode) -> None:
    for method in COMPRESSING:
        cache = make(model, grid, method, budget="60KB", **({"grouping_rows": 2} if method == "headkv" else {}))
        decode(inputs, cache, 64)
        # Rows shorter than the longest leave something over, and what is left is less than one entry per head.
        short = 2 * 2 * ((20 - 13) + (20 - 17)) * (2 * 8 * 4 + 8)
        assert 60_000 - short - 2 * 2 * 3 * (2 * 8 * 4 + 8) <= cache.nbytes <= 60_000
    with pytest.raises(ValueError, match="bytes"):
        decode(inputs, make(model, grid, "lines", budget="4KB"), 2)
    plenty = make(model, grid, "lines", budget="4MB")
    stock = decode(inputs, DynamicCache(config=model.config), 40)
    assert (decode(inputs, plenty, 40).logits - stock.logits).abs().max() < 1e-4


def test_kept_positions_skip_padding_and_count_from_the_first_real_token(model, grid, inputs, decode) -> None:
    for cache in (make(model, grid), make(model, grid, "none")):
        decode(inputs, cache, 2)
        assert [len(heads[0]) for heads in cache.kept_positions(1)] == [14, 18, 21]
        assert cache.kept_positions(0)[0][0].tolist() == list(range(14))
        assert cache.kept_positions(0)[0][0].dtype == torch.int64


def test_report_says_what_is_held(model, grid, inputs, decode) -> None:
    import json

    cache = make(model, grid, tau=0.3)
    decode(inputs, cache, 40)
    report = cache.report()
    assert (report.method, report.budget, report.options) == ("headkv", 0.25, {"tau": 0.3})
    assert report.nbytes == cache.nbytes
    assert report.ratio == cache.nbytes / cache.nbytes_full
    assert report.tokens_seen == 20 + 39
    assert report.lengths == [[[len(h) for h in row] for row in cache.kept_positions(layer)] for layer in range(2)]
    labels = [kind for layer in report.types for row in layer for kind in row]
    assert set(labels) <= {"local", "global"}
    assert report.local_share == pytest.approx(labels.count("local") / len(labels))
    json.dumps(report.to_dict())


class TestRefusals:
    """Bad input says what was wrong."""

    def test_unknown_names(self, model, grid) -> None:
        with pytest.raises(ValueError, match=r"unknown method 'headvk'.*headkv"):
            make(model, grid, "headvk")
        with pytest.raises(ValueError, match=r"no option 'windw'.*strata_ratio"):
            make(model, grid, windw=3)

    @pytest.mark.parametrize("budget", [0, 0.0, -1, -0.5, 1.5, "0B", "many"])
    def test_budgets_outside_their_range(self, model, grid, budget) -> None:
        with pytest.raises(ValueError, match="budget"):
            make(model, grid, budget=budget)

    def test_a_budget_below_one_row_and_two(self, model, grid) -> None:
        with pytest.raises(ValueError, match=r"at least 10 entries or a fraction of 0.1562"):
            make(model, grid, budget=9)
        make(model, grid, budget=10)

    def test_no_grid(self, model) -> None:
        with pytest.raises(ValueError, match=r"'lines' serves image only; .*image_grid=ImageGrid"):
            HeadKVCache(model, "lines")

    def test_a_grouping_after_the_last_row(self, model, grid) -> None:
        with pytest.raises(ValueError, match=r"grouping_rows=8 keeps all 8 rows.*at most 7"):
            make(model, grid, grouping_rows=8)

    def test_another_batch(self, model, grid, inputs, decode) -> None:
        cache = make(model, grid)
        decode(inputs, cache, 3)
        with pytest.raises(ValueError, match="holds 3 rows and got keys of 2"):
            decode({name: tensor[:2] for name, tensor in inputs.items()}, cache, 1)

    def test_gradients(self, model, grid, inputs) -> None:
        with pytest.raises(RuntimeError, match="no_grad"):
            model(**inputs, past_key_values=make(model, grid))

    def test_an_attention_that_is_not_ours(self, model, grid, inputs) -> None:
        cache = make(model, grid)
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="does not run the 'headkv' attention"):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=4)

    def test_assisted_decoding(self, model, grid, inputs) -> None:
        one = {name: tensor[2:] for name, tensor in inputs.items()}
        settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "eos_token_id": 0}
        # Older transformers tell the cache nothing before they take tokens back.
        with pytest.raises(ValueError, match=r"assisted decoding|cannot be cropped"):
            model.generate(**one, past_key_values=make(model, grid), **settings)

    def test_latent_attention_and_shared_layers(self, grid) -> None:
        from transformers import DeepseekV3Config, Gemma3nTextConfig

        with pytest.raises(ValueError, match="latent"):
            HeadKVCache(DeepseekV3Config(), "headkv", image_grid=grid)
        with pytest.raises(ValueError, match="shares keys and values"):
            HeadKVCache(Gemma3nTextConfig(), "headkv", image_grid=grid)
