# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from headkv_mm.cache import HeadKVCache
from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.evaluation import labels
from headkv_mm.evaluation.fidelity import forced_scores
from headkv_mm.evaluation.prompts import Prompts, encode

ROW = 16


@pytest.fixture(scope="module")
def image(model: Any) -> tuple[Prompts, Tensor]:
    prompts = encode(model, [caption(scene) for scene in unseen_scenes(4, 5)])
    return prompts, torch.randint(369, (4, 256), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [{}, {"include_condition": True}, {"grouping_queries": 1}, {"grouping_rows": 6, "grouping_queries": 40}],
    ids=["row", "condition", "one query", "more than a row"],
)
def test_early_labels_are_those_that_the_cache_gives(
    model: Any, image: tuple[Prompts, Tensor], options: dict[str, Any]
) -> None:
    prompts, tokens = image
    rows, taus = options.get("grouping_rows", 4), tuple(share / 20 for share in range(1, 20))
    needed = labels.tokens_needed(
        labels.watching_copy(model),
        prompts,
        tokens,
        [rows],
        row=ROW,
        taus=taus,
        queries=options.get("grouping_queries"),
        include_condition=options.get("include_condition", False),
    )[rows]
    local = needed < 32  # two rows, which the budget allows
    mixed = min(range(len(taus)), key=lambda index: abs(float(local[..., index].double().mean()) - 0.5))
    assert 0 < float(local[..., mixed].double().mean()) < 1
    cache = HeadKVCache(model, "headkv", budget=1 / 4, tau=taus[mixed], **options)
    for _ in zip(range(rows * ROW + 1), forced_scores(model, prompts, tokens, cache)):
        pass
    given = [layer.allocation.local for layer in cache.compressed_layers if layer.allocation is not None]
    assert torch.equal(torch.stack([label for label in given if label is not None]), local[..., mixed])


def test_tokens_are_counted_backward_until_the_share_is_reached(model: Any, image: tuple[Prompts, Tensor]) -> None:
    prompts, tokens = image
    taus = (0.3, 0.8)
    found = labels.tokens_needed(labels.watching_copy(model), prompts, tokens, [2, 16], row=ROW, taus=taus)
    ids = torch.cat((prompts.ids, tokens), 1)
    mask = torch.cat((prompts.mask, torch.ones_like(tokens)), 1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    columns, group = prompts.ids.shape[1], 2
    for layer, attention in enumerate(attentions):
        for row in (2, 16):
            for image_index, head in ((0, 0), (3, 1)):
                share = torch.zeros(row * ROW, dtype=torch.float64)
                for query in range(columns + (row - 1) * ROW, columns + row * ROW):
                    for member in range(head * group, (head + 1) * group):
                        visual = attention[image_index, member, query, columns : columns + row * ROW].double()
                        share += visual / visual.sum() / (ROW * group)
                for index, tau in enumerate(taus):
                    count, total = 0, 0.0
                    while total < tau:
                        count += 1
                        total += float(share[-count])
                    assert int(found[row][layer, image_index, head, index]) == count


def test_a_head_that_looks_at_the_prompt_alone_is_labelled_by_the_rest(
    model: Any, image: tuple[Prompts, Tensor]
) -> None:
    # Queries so long that the prompt takes all the attention that float32 can hold.
    extreme = copy.deepcopy(model)
    with torch.no_grad():
        for layer in extreme.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(300)
    prompts, tokens = image
    found = labels.tokens_needed(labels.watching_copy(extreme), prompts, tokens, [4], row=ROW, taus=(0.9,))[4]
    cache = HeadKVCache(extreme, "headkv", budget=1 / 4)
    for _ in zip(range(4 * ROW + 1), forced_scores(extreme, prompts, tokens, cache)):
        pass
    given = [layer.allocation.local for layer in cache.compressed_layers if layer.allocation is not None]
    assert torch.equal(torch.stack([label for label in given if label is not None]), found[..., 0] < 32)


def test_the_model_itself_stays_as_it_is(model: Any) -> None:
    before = model.config.get_text_config()._attn_implementation
    twin = labels.watching_copy(model)
    assert model.config.get_text_config()._attn_implementation == before
    assert twin.config.get_text_config()._attn_implementation != before


def test_stability_counts_labels() -> None:
    early = torch.tensor([1, 1, 9, 9]).view(1, 2, 2, 1)
    late = torch.tensor([1, 9, 9, 1]).view(1, 2, 2, 1)
    assert labels.stability(early, late, 5, (0.9,)) == [
        {
            "tau": 0.9,
            "local_early": 0.5,
            "local_late": 0.5,
            "changed": 0.5,
            "changed_of_local": 0.5,
            "changed_of_global": 0.5,
        }
    ]
    nothing_local = labels.stability(early + 9, late + 9, 5, (0.9,))[0]
    assert nothing_local["local_early"] == nothing_local["changed"] == nothing_local["changed_of_local"] == 0
