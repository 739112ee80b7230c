# SPDX-License-Identifier: Apache-2.0
"""Models that answer about images: the prompt's image and text tokens are compressed like any text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessorList
from transformers.masking_utils import sdpa_mask

from headkv_mm import HeadKVCache, ImageGrid, compress

from .vision_models import FAMILIES, questions, vision_model

STEPS, BUDGET, INTERVAL = 14, 16, 4
METHODS = ("headkv", "adakv")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return vision_model(request.param)


def generate(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
    )


def test_a_budget_of_everything_is_the_stock_cache(model: Any) -> None:
    inputs, _ = questions()
    stock = generate(model, inputs)
    for method, budget in (("headkv", 1.0), ("none", None)):
        with compress(model, method, **({} if budget is None else {"budget": budget})):
            assert torch.equal(generate(model, inputs).sequences, stock.sequences)
    # All is kept, and every decoded token goes through our attention.
    held = generate(model, inputs, past_key_values=HeadKVCache(model, "snapkv", budget=100))
    assert (torch.stack(held.logits) - torch.stack(stock.logits)).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_is_a_full_cache_with_a_mask(model: Any, method: str) -> None:
    inputs, _ = questions()
    pads = (inputs["attention_mask"] == 0).sum(-1).tolist()
    width = inputs["input_ids"].shape[1]
    cache = HeadKVCache(model, method, budget=BUDGET, interval=INTERVAL)
    kept: list[list[list[list[Tensor]]]] = []

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        kept.append([cache.kept_positions(layer) for layer in range(len(cache))])
        return scores

    compressed = generate(model, inputs, past_key_values=cache, logits_processor=LogitsProcessorList([watch]))

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        batch, heads, tokens, _ = query.shape
        group, columns = heads // key.shape[1], key.shape[2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, 1, tokens, columns, dtype=torch.bool).tril(columns - tokens)
        allowed = attention_mask.expand(batch, heads, tokens, columns).clone()
        if tokens == 1:
            for row in range(batch):
                for head in range(key.shape[1]):
                    may = torch.zeros(columns, dtype=torch.bool)
                    may[kept[columns - width - 1][module.layer_idx][row][head] + pads[row]] = True
                    may[-1] = True
                    allowed[row, head * group : (head + 1) * group] &= may
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
        weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("questions_oracle", attention)
    AttentionMaskInterface.register("questions_oracle", sdpa_mask)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "questions_oracle"})
    try:
        full = generate(model, inputs, past_key_values=DynamicCache(config=model.config.get_text_config()))
    finally:
        model.set_attn_implementation({"text_config": before})
    assert (torch.stack(full.logits) - torch.stack(compressed.logits)).abs().max() < 1e-4
    assert torch.equal(full.sequences, compressed.sequences)
    stock = generate(model, inputs)
    assert not torch.equal(stock.sequences, compressed.sequences)  # something was evicted that mattered


def test_positions_are_right_to_the_last_token(model: Any) -> None:
    inputs, _ = questions()
    seen: list[Tensor] = []
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    try:
        generate(model, inputs)
        stock, seen = seen, []
        with compress(model, "headkv", budget=BUDGET, interval=INTERVAL):
            generate(model, inputs)
    finally:
        hook.remove()
    assert len(stock) == len(seen) == STEPS
    assert all(torch.equal(one, other) for one, other in zip(stock, seen, strict=True))
    # Height and width of an image share positions, so the newest token comes before the number of tokens so far.
    assert int(stock[-1].max()) < inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_answers_as_each_question_alone_and_holds_its_budget(model: Any, method: str) -> None:
    inputs, alone = questions()
    with compress(model, method, budget=BUDGET, interval=INTERVAL) as session:
        both = generate(model, inputs).sequences
        lengths = session.report().lengths
        kept = session.caches[0].kept_positions(1)[1]
        one = generate(model, alone).sequences
        assert [head.tolist() for head in session.caches[0].kept_positions(1)[0]] == [head.tolist() for head in kept]
    assert torch.equal(both[1, -STEPS:], one[0, -STEPS:])
    heads, since = 2, (STEPS - 1) % INTERVAL
    assert {sum(row) for layer in lengths for row in layer} == {heads * (BUDGET + since)}


def test_bytes_are_what_was_asked_for(model: Any) -> None:
    inputs, _ = questions()
    with compress(model, "snapkv", budget="24KiB", interval=INTERVAL) as session:
        generate(model, inputs)
        report = session.report()
    assert 20 << 10 < report.nbytes <= 24 << 10 < report.nbytes_full


def test_a_model_that_only_looks_at_images_has_no_grid() -> None:
    from transformers import JanusConfig, PaliGemmaConfig

    looking = PaliGemmaConfig()
    looking.vision_config.num_image_tokens = 256  # as published configurations state it
    assert ImageGrid.from_config(looking) is None
    assert ImageGrid.from_config(JanusConfig()) == ImageGrid(24, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "text", "image_grid": ImageGrid(4, 4)}, "exclude each other"),
        ({"kind": "image"}, "states no image grid"),
        ({"kind": "sound"}, "kind must be"),
    ],
)
def test_kinds_that_make_no_sense(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadKVCache(model, "snapkv", **arguments)
