# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from headkv_mm.cache import HeadKVCache
from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.demo.tokenizer import prompt_words
from headkv_mm.evaluation.fidelity import compare, divergence, first_affected_token, forced_scores
from headkv_mm.evaluation.prompts import Prompts, encode
from headkv_mm.llamagen.prompts import id_rows

SCENES = unseen_scenes(3, 0)


@pytest.fixture(scope="module", params=[1.0, 2.0], ids=["no guidance", "guidance"])
def forced(request: pytest.FixtureRequest, model: Any) -> tuple[Prompts, Tensor, Tensor, Tensor]:
    """Prompts, the stock cache's images, and the scores it generated and read them with."""
    prompts = encode(model, [caption(scene) for scene in SCENES])
    prompts = Prompts(prompts.ids, prompts.mask, prompts.negative_ids, prompts.negative_mask, request.param)
    seen: list[Tensor] = []

    def watch(tokens: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    tokens = model.generate(
        prompts.ids, prompts.mask, guidance_scale=request.param, seeds=[1, 2, 3], logits_processor=watch
    )
    scores = torch.stack(list(forced_scores(model, prompts, tokens, DynamicCache(config=model.config.text_config))), 1)
    return prompts, tokens, torch.stack(seen, 1), scores


def test_reading_an_image_gives_the_scores_it_was_generated_from(
    forced: tuple[Prompts, Tensor, Tensor, Tensor],
) -> None:
    _, _, generated, scores = forced
    assert torch.equal(scores, generated)


def test_with_everything_kept_nothing_differs(forced: tuple[Prompts, Tensor, Tensor, Tensor], model: Any) -> None:
    prompts, tokens, _, scores = forced
    found = compare(scores, forced_scores(model, prompts, tokens, HeadKVCache(model, "headkv", budget=1.0)))
    assert bool(found.agreement.all())
    assert float(found.kl.abs().max()) == 0.0


def test_only_what_follows_an_eviction_differs(forced: tuple[Prompts, Tensor, Tensor, Tensor], model: Any) -> None:
    prompts, tokens, _, scores = forced
    cache = HeadKVCache(model, "streaming", budget=1 / 8, first_eviction_rows=4)
    found = compare(scores, forced_scores(model, prompts, tokens, cache))
    first = first_affected_token(4, 16)
    assert float(found.kl[:, :first].max()) < 1e-8
    assert float(found.kl[:, first].min()) > 1e-6
    assert float(found.kl[:, first:].mean()) > 1e-3
    assert not bool(found.agreement.all())


def test_divergence_is_that_of_torch() -> None:
    wanted, scores = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    expected = functional.kl_div(
        scores.double().log_softmax(-1), wanted.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(divergence(wanted, scores), expected)
    assert bool((divergence(wanted, wanted) == 0).all())
    assert float(divergence(wanted, scores).min()) > 0


def test_prompts_are_the_words_of_the_scene(model: Any) -> None:
    from headkv_mm.demo.image_model import word_ids

    prompts, ids = encode(model, [caption(scene) for scene in SCENES]), word_ids()
    for row, mask, scene in zip(prompts.ids, prompts.mask, SCENES):
        assert row[mask.bool()].tolist() == [ids[word] for word in prompt_words(scene)]


def test_the_unconditional_rows_are_those_of_generation(model: Any) -> None:
    prompts = encode(model, [caption(scene) for scene in SCENES])
    rows = id_rows(model.config, prompts.ids, None, None, None, guided=True)
    ids, mask = rows.inputs["input_ids"][len(SCENES) :], rows.mask[len(SCENES) :]
    assert torch.equal(prompts.negative_mask, mask)
    assert torch.equal(prompts.negative_ids[mask.bool()], ids[mask.bool()])


def test_a_model_of_another_world_is_refused() -> None:
    from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

    text = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    text |= {"intermediate_size": 16, "num_key_value_heads": 1}
    config = LlamaGenConfig(text_config=text, image_height=4, image_width=4, codebook_size=10, max_prompt_length=4)
    with pytest.raises(ValueError, match="this model has 10: use the embedded model"):
        encode(LlamaGenForConditionalGeneration(config), ["red circle top on white"])
