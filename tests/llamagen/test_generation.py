# SPDX-License-Identifier: Apache-2.0
"""Generation: caches, sampling, guidance, seeds, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

from headkv_mm.image_sampling import draw, uniform_streams
from headkv_mm.llamagen import LlamaGenForConditionalGeneration

PROMPT, STEPS = 6, 12
PAD, NULL, BOS, BOI = 20, 21, 22, 23
TeacherForced = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def test_cached_generation_equals_teacher_forcing(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    tokens = model.generate(prompts, mask, do_sample=False)
    assert tokens.shape == (3, STEPS)
    assert torch.equal(tokens, teacher_forced(prompts, mask, tokens).argmax(-1))


def test_sampling_draws_from_the_teacher_forced_distribution(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    seeds = [5, 6, 7]
    tokens = model.generate(prompts, mask, do_sample=True, temperature=0.8, top_k=7, seeds=seeds)
    scores = teacher_forced(prompts, mask, tokens) / 0.8
    scores = scores.masked_fill(scores < scores.topk(7, dim=-1).values[..., -1:], -torch.inf)
    uniform = uniform_streams(3, STEPS, seeds, None)
    expected = torch.stack([draw(scores[:, step], uniform[:, step]) for step in range(STEPS)], dim=1)
    assert torch.equal(tokens, expected)


def test_top_p_keeps_the_smallest_set(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    tokens = model.generate(prompts, mask, do_sample=True, top_p=1e-6, seeds=[1, 2, 3])
    assert torch.equal(tokens, model.generate(prompts, mask, do_sample=False))


def test_guidance_mixes_conditional_and_unconditional_scores(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    tokens = model.generate(prompts, mask, do_sample=False, guidance_scale=2.5)
    null = torch.tensor([[PAD, PAD, PAD, BOS, NULL, BOI]]).expand(3, -1)
    conditional = teacher_forced(prompts, mask, tokens)
    unconditional = teacher_forced(null, (null != PAD).long(), tokens)
    assert torch.equal(tokens, (unconditional + 2.5 * (conditional - unconditional)).argmax(-1))
    assert not torch.equal(tokens, model.generate(prompts, mask, do_sample=False))
    explicit = model.generate(prompts, mask, do_sample=False, guidance_scale=2.5, negative_prompt_ids=null[:1])
    assert torch.equal(tokens, explicit)


def test_negative_prompts_per_image(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    tokens = model.generate(
        prompts, mask, do_sample=False, guidance_scale=2.0, negative_prompt_ids=prompts.flip(0).contiguous()
    )
    conditional = teacher_forced(prompts, mask, tokens)
    negative = teacher_forced(prompts.flip(0), mask.flip(0), tokens)
    assert torch.equal(tokens, (2 * conditional - negative).argmax(-1))


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_an_image_is_the_same_alone_and_in_any_batch(
    model: LlamaGenForConditionalGeneration, guidance: float, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    seeds = [11, 12, 13]
    together = model.generate(prompts, mask, do_sample=True, seeds=seeds, guidance_scale=guidance)
    for row in range(3):
        alone = model.generate(
            prompts[row : row + 1], mask[row : row + 1], do_sample=True, seeds=seeds[row : row + 1],
            guidance_scale=guidance,
        )  # fmt: skip
        assert torch.equal(alone[0], together[row])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(
        together, model.generate(prompts, mask, do_sample=True, generator=generators, guidance_scale=guidance)
    )
    assert not torch.equal(
        together, model.generate(prompts, mask, do_sample=True, seeds=[21, 22, 23], guidance_scale=guidance)
    )


def test_without_seeds_the_global_stream_decides(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    torch.manual_seed(3)
    first = model.generate(prompts, mask, do_sample=True)
    second = model.generate(prompts, mask, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(prompts, mask, do_sample=True))
    assert not torch.equal(first, second)


def test_cache_choice(
    model: LlamaGenForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    expected = model.generate(prompts, mask, do_sample=False)
    calls: list[dict[str, Any]] = []
    made = DynamicCache(config=model.config.get_text_config())

    def prepare(**arguments: Any) -> DynamicCache:
        calls.append(arguments)
        return made

    monkeypatch.setattr(model, "_prepare_static_cache", prepare)
    assert torch.equal(model.generate(prompts, mask, do_sample=False), expected)
    assert made.get_seq_length() == PROMPT + STEPS - 1
    assert calls[0]["batch_size"] == 3
    assert calls[0]["max_cache_len"] == PROMPT + STEPS
    own = DynamicCache(config=model.config.get_text_config())
    assert torch.equal(model.generate(prompts, mask, do_sample=False, past_key_values=own), expected)
    assert own.get_seq_length() == PROMPT + STEPS - 1
    assert len(calls) == 1
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        model.generate(prompts, mask, past_key_values=own)


def test_callback_and_logits_processor(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    class OnlyCodeThree(LogitsProcessor):
        lengths: list[int] = []  # noqa: RUF012 (a record of one test)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([3]), 0.0)

    processor, progress = OnlyCodeThree(), []
    tokens = model.generate(
        prompts, mask, do_sample=True, logits_processor=LogitsProcessorList([processor]),
        callback=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert bool((tokens == 3).all())
    assert processor.lengths == list(range(STEPS))
    assert progress == [(step + 1, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p, m: {"input_ids": p[:, 1:]}, "pad them on the left"),
        (lambda p, m: {"input_ids": p[0]}, "pad them on the left"),
        (lambda p, m: {"input_ids": p + 10}, r"prompt ids must be in 0\.\.29"),
        (lambda p, m: {"attention_mask": m[:, 1:]}, "must have the prompts' shape"),
        (lambda p, m: {"attention_mask": m.flip(1)}, "padded on the left"),
        (lambda p, m: {"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        (lambda p, m: {"negative_prompt_ids": p[:1]}, "no effect without guidance"),
        (lambda p, m: {"negative_prompt_ids": p[:2], "guidance_scale": 2.0}, "expected 1 or 3 negative prompts"),
        (lambda p, m: {"temperature": 0.0}, "temperature must be above 0"),
        (lambda p, m: {"top_k": -1}, "top_k must be at least 0"),
        (lambda p, m: {"top_p": 0.0}, "top_p must be above 0"),
        (lambda p, m: {"seeds": [1, 2]}, "one seed or generator per image"),
        (lambda p, m: {"seeds": [1, 2, 3], "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_input_of_generate(
    model: LlamaGenForConditionalGeneration,
    arguments: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]],
    message: str,
    prompts: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": prompts, "attention_mask": mask, **arguments(prompts, mask)})


def test_draw_follows_the_distribution() -> None:
    scores = torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf]).expand(20_000, -1)
    codes = draw(scores, uniform_streams(1, 20_000, [0], None)[0])
    shares = torch.bincount(codes, minlength=5) / len(codes)
    torch.testing.assert_close(shares, scores[0].softmax(-1), rtol=0, atol=0.015)
    assert shares[1] == shares[4] == 0
    edge = draw(scores[:1], torch.tensor([1 - 2**-53], dtype=torch.float64))
    assert edge.item() == 3
    assert draw(torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1, dtype=torch.float64)).item() == 1
