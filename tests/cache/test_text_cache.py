# SPDX-License-Identifier: Apache-2.0
"""The compressed cache of a text, against the stock cache and against a full cache with the evicted entries masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from headkv_mm import HeadKVCache, compress, methods, plan_memory

COMPRESSING = [name for name in methods("text") if name not in ("none", "headkv-r2", "compresskv", "compilerkv")]
"""Three need tables for the model; `test_outside_check`, the tests by their names and the properties cover them."""
LENGTHS = (53, 57, 60)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Three prompts of 53, 57 and 60 tokens, left padded."""
    ids = torch.randint(6, 120, (3, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : 60 - length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def carry_on(model: LlamaForCausalLM, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of several tokens at once after what the cache has seen; `mask` [B, seen + T] covers both."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("method", COMPRESSING)
@pytest.mark.parametrize("settings", [{"budget": 24, "interval": 7}, {"budget": 0.4}], ids=str)
def test_what_was_evicted_is_as_good_as_masked(model, inputs, decode, oracle, method, settings) -> None:
    run = decode(inputs, HeadKVCache(model, method, **settings), 50)
    assert (run.logits - oracle(inputs, run)).abs().max() < 1e-4


@pytest.mark.parametrize("method", COMPRESSING)
@pytest.mark.parametrize("settings", [{"budget": 24, "interval": 7}, {"budget": 0.4}, {"budget": 56}], ids=str)
def test_a_row_of_a_batch_is_the_prompt_alone(model, inputs, decode, method, settings) -> None:
    together = HeadKVCache(model, method, **settings)
    batch = decode(inputs, together, 50)
    for row, length in enumerate(LENGTHS):
        alone = HeadKVCache(model, method, **settings)
        single = decode(
            {name: tensor[row : row + 1, 60 - length :] for name, tensor in inputs.items()},
            alone,
            50,
            forced=batch.tokens[row : row + 1],
        )
        assert (batch.logits[row] - single.logits[0]).abs().max() < 1e-4
        for layer in range(2):
            assert str(together.kept_positions(layer)[row]) == str(alone.kept_positions(layer)[0])


@pytest.mark.parametrize("method", [*COMPRESSING, "none"])
def test_a_budget_of_everything_is_the_stock_cache_bit_for_bit(model, inputs, decode, method) -> None:
    stock = decode(inputs, DynamicCache(config=model.config), 30)
    assert torch.equal(decode(inputs, HeadKVCache(model, method, budget=1.0), 30).logits, stock.logits)


@pytest.mark.parametrize("method", COMPRESSING)
def test_a_prompt_within_the_budget_is_kept_whole(model, inputs, decode, method) -> None:
    stock = decode(inputs, DynamicCache(config=model.config), 30)
    cache = HeadKVCache(model, method, budget=100)
    assert (decode(inputs, cache, 30).logits - stock.logits).abs().max() < 1e-4
    for layer in range(2):
        for row, heads in enumerate(cache.kept_positions(layer)):
            assert all(torch.equal(head, torch.arange(LENGTHS[row] + 29)) for head in heads)


@pytest.mark.parametrize("method", COMPRESSING)
def test_storage_is_the_budget_and_one_interval(model, inputs, decode, method) -> None:
    cache = HeadKVCache(model, method, budget=24, interval=7)
    decode(inputs, cache, 50)
    slots = [(layer.store.keys.shape, layer.store.values.shape) for layer in cache.compressed_layers]
    # Some methods divide a budget among the layers; all rows and both KV heads of both layers hold it on the average.
    assert sum(keys[0] for keys, _ in slots) == 2 * 3 * 2 * (24 + 7)
    assert all(keys == values for keys, values in slots)
    decode_more = HeadKVCache(model, method, budget=24, interval=7)
    decode(inputs, decode_more, 200)
    assert decode_more.nbytes <= cache.nbytes_peak  # a longer text takes no more
    reached = _tensors_reached(cache)
    assert cache.nbytes == sum(storage.nbytes() for storage in reached.values())


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


def test_a_share_grows_with_the_text(model, inputs, decode) -> None:
    one = {name: tensor[2:] for name, tensor in inputs.items()}
    cache = HeadKVCache(model, "snapkv", budget=0.4)
    for tokens in (1, 100, 300):
        cache.reset()
        decode(one, cache, tokens)
        seen = 60 + tokens - 1
        for layer in range(2):
            for head in cache.kept_positions(layer)[0]:
                # Between evictions an interval waits, and a share grows by steps of a 32nd.
                assert 0.4 * seen * 31 / 33 - 14 <= len(head) <= round(0.4 * seen) + 32
    assert cache.nbytes / cache.nbytes_full < 0.6


def test_a_budget_in_bytes_holds_at_most_those_bytes(model, inputs, decode) -> None:
    one = {name: tensor[2:] for name, tensor in inputs.items()}
    for method in COMPRESSING:
        cache = HeadKVCache(model, method, budget="20KB")
        decode(one, cache, 80)
        assert 15_000 < cache.nbytes <= 20_000, method
    with pytest.raises(ValueError, match=r"budget '2KB' leaves 0 entries per KV head.*use at least \d+ bytes"):
        decode(one, HeadKVCache(model, "snapkv", budget="2KB"), 1)
    with pytest.raises(ValueError, match=r"budget 7 is too small for a text: .* at least 8 entries"):
        HeadKVCache(model, "snapkv", budget=7)


def test_prefill_never_holds_more_than_one_dense_layer(model, inputs) -> None:
    cache = HeadKVCache(model, "snapkv", budget=16)
    held: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: held.append(cache.nbytes)) for layer in model.model.layers]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    dense = 2 * 3 * 2 * 60 * 8 * 4
    kept = 2 * 3 * 2 * 16 * (8 * 4)
    assert kept < held[0] < kept * 1.5 < dense
    assert held[1] == pytest.approx(2 * held[0], rel=0.01)
    assert cache.nbytes_peak == pytest.approx(held[1] + dense, rel=0.1)


@pytest.mark.parametrize("method", COMPRESSING)
def test_reading_in_chunks_is_reading_at_once(model, inputs, decode, method) -> None:
    whole = HeadKVCache(model, method, budget=20)
    expected = decode(inputs, whole, 1)
    cache = HeadKVCache(model, method, budget=20)
    mask = inputs["attention_mask"]
    with cache.reading():
        for first in range(0, 60, 25):
            last = min(first + 25, 60)
            logits = carry_on(model, cache, inputs["input_ids"][:, first:last], mask[:, :last])
        assert cache.nbytes > 2 * 2 * 3 * 2 * 60 * 8 * 4  # everything is there
    assert (logits[:, -1] - expected.logits[:, 0]).abs().max() < 1e-4
    for layer in range(2):
        assert str(cache.kept_positions(layer)) == str(whole.kept_positions(layer))
    assert cache.nbytes == whole.nbytes
    with pytest.raises(ValueError, match="has seen 60 tokens already"), cache.reading():
        pass


def test_a_reading_that_fails_leaves_an_empty_cache(model, inputs) -> None:
    cache = HeadKVCache(model, "snapkv", budget=20)

    def fail_while_reading() -> None:
        with cache.reading():
            carry_on(model, cache, inputs["input_ids"], inputs["attention_mask"])
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_reading()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_chunks_without_reading_take_bounded_memory(model, inputs) -> None:
    cache = HeadKVCache(model, "snapkv", budget=16, interval=4)
    ids, mask = inputs["input_ids"][2:], inputs["attention_mask"][2:]
    for last in range(10, 70, 10):
        logits = carry_on(model, cache, ids[:, last - 10 : last], mask[:, :last])
        assert torch.isfinite(logits).all()
        for layer in cache.compressed_layers:
            assert layer.store.keys.shape[0] <= 2 * (16 + 4)
    assert [len(head) for head in cache.kept_positions(0)[0]] == [16, 16]


def test_a_second_turn_sees_what_was_kept_and_the_tokens_before_it(model, inputs, decode) -> None:
    """The turn's tokens one by one in a copy that evicts nothing give the same logits as all at once."""
    cache = HeadKVCache(model, "adakv" if "adakv" in COMPRESSING else "snapkv", budget=24)
    decode(inputs, cache, 1)
    turn = torch.randint(6, 120, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)], 1)
    slow = cache.copy(evict=False)
    at_once = carry_on(model, cache, turn, mask)
    for index in range(9):
        one = carry_on(model, slow, turn[:, index : index + 1], mask[:, : 60 + index + 1])
        assert (one[:, 0] - at_once[:, index]).abs().max() < 1e-4
    total = sum(len(head) for layer in range(2) for head in cache.kept_positions(layer)[0])
    assert total == 2 * 2 * 24  # and then the turn was compressed too


@pytest.mark.parametrize("method", COMPRESSING)
def test_a_copy_leaves_its_original_alone(model, inputs, decode, method) -> None:
    cache = HeadKVCache(model, method, budget=24)
    decode(inputs, cache, 1)
    before, nbytes = [cache.kept_positions(layer) for layer in range(2)], cache.nbytes
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)], 1)
    first, second = (torch.randint(6, 120, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    alone = carry_on(model, cache.copy(evict=False), second, mask)
    grown = cache.copy(evict=False)
    carry_on(model, grown, first, mask)
    assert torch.equal(carry_on(model, cache.copy(evict=False), second, mask), alone)
    assert str([cache.kept_positions(layer) for layer in range(2)]) == str(before)
    assert cache.nbytes == nbytes
    for layer in range(2):
        for row, heads in enumerate(grown.kept_positions(layer)):
            for head, kept in zip(heads, before[layer][row], strict=True):
                assert torch.equal(head[:-9], kept)


def test_a_copy_that_only_grows_keeps_growing(model, inputs, decode) -> None:
    cache = HeadKVCache(model, "snapkv", budget=24, interval=5)
    decode(inputs, cache, 1)
    grown = cache.copy(evict=False)
    ids = torch.randint(6, 120, (3, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 40, dtype=torch.long)], 1)
    for index in range(40):
        carry_on(model, grown, ids[:, index : index + 1], mask[:, : 60 + index + 1])
    assert {len(head) for layer in range(2) for row in grown.kept_positions(layer) for head in row} == {24 + 40}


def test_two_conversations_on_one_model_do_not_see_each_other(model, inputs, decode) -> None:
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    two = {name: tensor[1:2] for name, tensor in inputs.items()}
    alone = decode(one, HeadKVCache(model, "snapkv", budget=20, interval=5), 30)
    first, second = (HeadKVCache(model, "snapkv", budget=20, interval=5) for _ in range(2))
    masks = [one["attention_mask"], two["attention_mask"]]
    logits, ids = [], [one["input_ids"], two["input_ids"]]
    for step in range(30):
        for index, cache in enumerate((first, second)):
            output = carry_on(model, cache, ids[index], masks[index])
            if index == 0:
                logits.append(output[:, -1])
            ids[index] = alone.tokens[:, step : step + 1]
            masks[index] = torch.cat([masks[index], torch.ones(1, 1, dtype=torch.long)], 1)
    assert torch.equal(torch.stack(logits, 1), alone.logits)


@pytest.mark.parametrize("method", COMPRESSING)
def test_beams_and_several_sequences(model, inputs, method) -> None:
    def generate(cache: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=20, **kwargs)

    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    sampled = {"num_return_sequences": 2, "do_sample": True}
    for settings in (beams, sampled):
        stock = generate(DynamicCache(config=model.config), **settings)
        assert torch.equal(stock, generate(HeadKVCache(model, method, budget=100), **settings))
        assert generate(HeadKVCache(model, method, budget=16, interval=4), **settings).shape == stock.shape


def test_reordered_rows_take_everything_along(model, inputs, decode) -> None:
    cache = HeadKVCache(model, "headkv", budget=24, interval=5, tau=0.5)
    decode(inputs, cache, 13)
    order = torch.tensor([2, 0, 0])
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    ids = torch.randint(6, 120, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 32, dtype=torch.long)], 1)
    for index in range(20):
        ones = mask[:, : 72 + index + 1]
        expected = carry_on(model, cache, ids[:, index : index + 1], ones)
        got = carry_on(model, moved, ids[order, index : index + 1], ones[order])
        assert (got - expected[order]).abs().max() < 1e-5


def test_crop_works_before_eviction_and_is_refused_after(model, inputs, decode) -> None:
    cache = HeadKVCache(model, "snapkv", budget=100)
    decode(inputs, cache, 20)
    cache.crop(-6)
    assert cache.get_seq_length() == 73
    assert [len(heads[0]) for heads in cache.kept_positions(0)] == [length + 13 for length in LENGTHS]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 14, dtype=torch.long)], 1)
    assert torch.isfinite(carry_on(model, cache, torch.full((3, 1), 9), mask)).all()
    evicted = HeadKVCache(model, "snapkv", budget=20)
    decode(inputs, evicted, 2)
    with pytest.raises(ValueError, match="evicted"):
        evicted.crop(-1)


def test_right_padding_is_no_content_either(model, inputs) -> None:
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[1], mask[1] = ids[1].roll(-3), mask[1].roll(-3)
    cache, alone = (HeadKVCache(model, "snapkv", budget=20) for _ in range(2))
    carry_on(model, cache, ids, mask)
    carry_on(model, alone, ids[1:2, :57], mask[1:2, :57])
    for layer in range(2):
        assert str(cache.kept_positions(layer)[1]) == str(alone.kept_positions(layer)[0])


@pytest.mark.parametrize("settings", [{"budget": 20}, {"budget": 0.3}, {"budget": "30KB"}, {"budget": 1.0}], ids=str)
@pytest.mark.parametrize("method", ["snapkv", "h2o", "headkv"])
def test_saved_and_loaded_it_goes_on_as_before(model, inputs, decode, tmp_path, method, settings) -> None:
    cache = HeadKVCache(model, method, **settings)
    decode(inputs, cache, 1)
    cache.save(tmp_path / "text.kv", model, extra={"name": "a text"})
    loaded = HeadKVCache.load(tmp_path / "text.kv", model)
    assert [path.name for path in tmp_path.iterdir()] == ["text.kv"]
    assert loaded.extra == {"name": "a text"}
    assert loaded.compression == cache.compression
    assert loaded.nbytes == cache.nbytes
    ids = torch.randint(6, 120, (3, 40), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 40, dtype=torch.long)], 1)
    for first, last in ((0, 5), *((index, index + 1) for index in range(5, 40))):
        expected = carry_on(model, cache, ids[:, first:last], mask[:, : 60 + last])
        assert torch.equal(carry_on(model, loaded, ids[:, first:last], mask[:, : 60 + last]), expected)


def test_saved_caches_that_do_not_fit_are_refused(model, inputs, decode, tmp_path) -> None:
    path = tmp_path / "text.kv"
    cache = HeadKVCache(model, "snapkv", budget=20)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.save(path, model)
    decode(inputs, cache, 1)
    with pytest.raises(ValueError, match="must be JSON types"):
        cache.save(path, model, extra={"what": object()})
    assert not list(tmp_path.iterdir())
    cache.save(path, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="filled by another model"):
        HeadKVCache.load(path, other)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or no saved cache"):
        HeadKVCache.load(path, model)
    edited = bytearray(content)
    edited[-9] ^= 1
    path.write_bytes(bytes(edited))
    with pytest.raises(ValueError, match="was edited or cut"):
        HeadKVCache.load(path, model)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no saved cache of headkv-mm"):
        HeadKVCache.load(path, model)
    with pytest.raises(FileNotFoundError):
        HeadKVCache.load(tmp_path / "nothing.kv", model)


def test_generate_inside_compress(model, inputs) -> None:
    with compress(model, "snapkv", budget=20) as session:
        output = model.generate(**inputs, max_new_tokens=25, do_sample=False)
    cache = HeadKVCache(model, "snapkv", budget=20)
    assert torch.equal(output, model.generate(**inputs, past_key_values=cache, max_new_tokens=25, do_sample=False))
    assert session.report().lengths == cache.report().lengths
    assert session.report().ratio < 0.8


def test_a_method_for_images_only_says_so(model) -> None:
    with pytest.raises(ValueError, match=r"'lines' serves image only; methods for text are: none, headkv"):
        HeadKVCache(model, "lines")


@pytest.mark.parametrize("budget", [24, 0.4, 1.0, "30KB"])
def test_memory_is_known_before_the_cache_exists(model, inputs, decode, budget) -> None:
    one = {name: tensor[2:] for name, tensor in inputs.items()}
    cache = HeadKVCache(model, "snapkv", budget=budget)
    decode(one, cache, 61)
    plan = plan_memory(model, "snapkv", budget=budget, tokens=120)
    assert plan.nbytes_full == cache.nbytes_full
    slots = sum(
        layer.keys.nbytes + layer.values.nbytes if layer.store is None else 2 * layer.store.keys.nbytes
        for layer in cache.compressed_layers
    )
    # A share has grown at the last eviction, 28 tokens ago.
    assert plan.nbytes * (0.8 if budget == 0.4 else 1) <= slots <= plan.nbytes
    with pytest.raises(ValueError, match="tokens=N for a text"):
        plan_memory(model, "snapkv")
