# SPDX-License-Identifier: Apache-2.0
"""GLM-Image: tokens from the stock `generate` of its autoregressive stage, pictures from its diffusers pipeline."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GlmImageForConditionalGeneration

import headkv_mm
from headkv_mm import ImageGrid
from headkv_mm.memory import storage_cost
from headkv_mm.pipelines.outputs import GenerationReport
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

from .image_oracle import largest_difference, masked_again, tracing
from .tiny_glm_image import CODES, VISION, glm_image_pipeline

GRID = ImageGrid(5, 6)
SHORT, LONG = "a cat", "a 'long' word"
SMALL = {"kv_compression": "headkv", "kv_budget": 0.5, "kv_options": {"grouping_rows": 2}}
METHODS = [SMALL, *({"kv_compression": name, "kv_budget": 0.4} for name in ("lines", "streaming", "pointed"))]


@pytest.fixture(scope="module")
def stock() -> Any:
    return glm_image_pipeline()


@pytest.fixture(scope="module")
def model(stock: Any) -> GlmImageForConditionalGeneration:
    return stock.vision_language_encoder


@pytest.fixture(scope="module")
def pipe(stock: Any) -> TextToImagePipeline:
    quick = partial(stock, num_inference_steps=2)
    return headkv_mm.pipeline("text-to-image", model=stock, image_decoder=quick, image_grid=GRID, device="cpu")


@pytest.fixture(scope="module")
def preview(pipe: TextToImagePipeline, stock: Any) -> int:
    """Tokens of the preview, as the processor says."""
    return int(stock_inputs(stock, [SHORT])["image_grid_thw"][1].prod())


def stock_inputs(stock: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What the stock pipeline makes of prompts."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    return stock.processor.apply_chat_template(
        messages,
        tokenize=True,
        padding=len(prompts) > 1,
        target_h=GRID.height * 32,
        target_w=GRID.width * 32,
        return_dict=True,
        return_tensors="pt",
    )


def test_a_full_budget_gives_the_stock_tokens(
    pipe: Any, stock: Any, model: Any, preview: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights repeat themselves; what the generation config says counts for both.
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 2)
    inputs = stock_inputs(stock, [SHORT, LONG])
    unwritten = list(range(CODES, VISION))  # a picture has no place for them
    wanted = model.generate(
        **inputs, max_new_tokens=preview + GRID.tokens + 1, suppress_tokens=unwritten, do_sample=False
    )[:, inputs["input_ids"].shape[1] + preview :][:, : GRID.tokens]
    assert len(set(wanted.flatten().tolist())) > 5
    for compression in ({}, {"kv_compression": "headkv", "kv_budget": 1.0}):
        outputs = pipe([SHORT, LONG], do_sample=False, batch_size=2, **compression)
        assert torch.equal(torch.cat([output.tokens for output in outputs]), wanted)
    assert not torch.equal(wanted[0], wanted[1])


def test_pictures_are_those_of_the_stock_pipeline(pipe: Any, stock: Any) -> None:
    outputs = pipe([SHORT, LONG], seed=3, batch_size=2)
    for prompt, output in zip((SHORT, LONG), outputs, strict=True):
        (image,) = output.images
        assert (image.mode, image.size) == ("RGB", (32 * GRID.width, 32 * GRID.height))
        prior = stock._upsample_token_ids(output.tokens, GRID.height, GRID.width)
        wanted = stock(
            prompt=prompt,
            height=160,
            width=192,
            prior_token_ids=prior,
            generator=torch.Generator().manual_seed(3),
            num_inference_steps=2,
        )
        assert image.tobytes() == wanted.images[0].tobytes()
    assert outputs[0].images[0].tobytes() != outputs[1].images[0].tobytes()
    assert pipe(LONG, seed=4).images[0].tobytes() != outputs[1].images[0].tobytes()


def test_the_diffusion_stage_takes_its_own_settings(pipe: Any, stock: Any) -> None:
    other = partial(stock, num_inference_steps=2, guidance_scale=4.0)
    guided = headkv_mm.pipeline("text-to-image", model=stock, image_decoder=other, image_grid=GRID, device="cpu")
    first, second = pipe(SHORT, seed=0), guided(SHORT, seed=0)
    assert torch.equal(first.tokens, second.tokens)
    assert first.images[0].tobytes() != second.images[0].tobytes()


def test_a_full_budget_samples_as_the_full_cache(pipe: Any) -> None:
    full = pipe(LONG, num_images=2, seed=3)
    assert not torch.equal(full.tokens[0], full.tokens[1])
    assert full.report.settings == {
        "guidance_scale": 1.0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    assert torch.equal(pipe(LONG, num_images=2, seed=3, kv_compression="lines", kv_budget=1.0).tokens, full.tokens)


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings["kv_compression"])
def test_eviction_equals_a_full_cache_with_the_evicted_masked(
    pipe: Any, model: Any, preview: int, settings: Any
) -> None:
    call = {"batch_size": 2, "seed": 1}
    with tracing(model, model.lm_head) as small:
        together = pipe([SHORT, LONG], keep_tokens=True, **call, **settings)
    assert len(small.logits) == preview + GRID.tokens
    pads = [[len(LONG) - len(SHORT), 0]]
    oracle = masked_again(model, model.lm_head, small, pads, lambda: pipe([SHORT, LONG], **call))
    assert largest_difference(small, oracle) < 1e-4
    with tracing(model, model.lm_head, again=small) as full:
        pipe([SHORT, LONG], **call)
    assert largest_difference(small, full) > 1e-2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(small.positions, full.positions, strict=True))
    # Positions run over rows and columns of the large image to its last token.
    last = small.positions[-1][:, 0, -1] - small.positions[preview + 1][:, 0, -1]
    assert last.tolist() == [0, GRID.height - 1, GRID.width - 2]
    alone = pipe(SHORT, seed=1, keep_tokens=True, **settings)
    assert torch.equal(alone.tokens, together[0].tokens)
    for ours, theirs in zip(alone.kept_tokens[0], together[0].kept_tokens[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_cache_holds_what_was_budgeted(pipe: Any, stock: Any, preview: int) -> None:
    budget, prompt = 16, stock_inputs(stock, [SHORT])["input_ids"].shape[1]
    report = pipe(SHORT, seed=0, kv_compression="streaming", kv_budget=budget).report
    (cache,) = report.caches
    condition = prompt + preview
    pieces = headkv_mm.Compression("streaming", budget=budget).pieces("image")
    cost = storage_cost(pieces, layers=2, rows=1, heads=4, kv_heads=2, head_dim=8, itemsize=4, condition=condition)
    assert cache.nbytes <= cost.of(budget, GRID.width)
    assert {room for layer in cache.capacities for room in layer[0]} == {condition + budget + GRID.width}
    assert cache.nbytes_full == 2 * 2 * 2 * 8 * 4 * (condition + GRID.tokens - 1)
    assert report.nbytes_weights == sum(item.nbytes for item in stock.vision_language_encoder.parameters())


def test_the_report_says_when_compression_does_not_pay(pipe: Any) -> None:
    # The preview is most of what so small an image holds, and every kept entry has its position beside it.
    report = pipe(SHORT, seed=0, kv_compression="streaming", kv_budget=0.9).report
    assert report.nbytes > report.nbytes_full
    assert "compression costs more than it saves" in str(report)

    def made(full: int, weights: int) -> GenerationReport:
        return GenerationReport(
            "none", None, {}, full, full, full, images=1, runs=1, tokens=1, seconds=1.0, nbytes_weights=weights
        )

    assert "only 1.00% of the 100.0 KiB of weights" in str(made(1024, 102400))
    assert made(10240, 102400).advice is None
    assert made(1024, 0).advice is None


def test_the_preview_counts_as_condition(pipe: Any, stock: Any, preview: int) -> None:
    assert pipe.image_grid == ImageGrid(5, 6, start=preview)
    out = pipe(SHORT, seed=0, keep_tokens=True, **SMALL)
    for heads in out.kept_tokens[0]:
        for kept in heads:
            assert set(range(24, 29)) <= set(kept.tolist())
            assert kept.min() >= 0 and kept.max() == 28
    prompt = out.report.caches[0].lengths[0][0][0] - len(out.kept_tokens[0][0][0]) - preview
    assert prompt == stock_inputs(stock, [SHORT])["input_ids"].shape[1]


def test_other_grids_leave_nothing_behind(pipe: Any) -> None:
    before = pipe(SHORT, seed=0).tokens
    wide = pipe(SHORT, seed=0, image_grid=ImageGrid(2, 8))
    assert wide.images[0].size == (256, 64)
    assert wide.tokens.shape == (1, 16)
    assert torch.equal(pipe(SHORT, seed=0).tokens, before)
    assert torch.equal(pipe(SHORT, seed=0, image_grid=pipe.image_grid).tokens, before)


def test_threads_take_turns(pipe: Any, stock: Any) -> None:
    twin = headkv_mm.pipeline(
        "text-to-image", model=stock, image_decoder=partial(stock, num_inference_steps=2), device="cpu"
    )
    jobs = [(pipe, {"seed": 1, **SMALL}), (twin, {"seed": 2, "image_grid": ImageGrid(2, 3)}), (pipe, {"seed": 3})]

    def run(job: tuple[Any, dict[str, Any]]) -> tuple[Tensor, bytes]:
        out = job[0](LONG, **job[1])
        return out.tokens, out.images[0].tobytes()

    wanted = [run(job) for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, jobs))
    for ours, theirs in zip(found, wanted):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def test_the_stock_pipeline_inside_compress(stock: Any, model: Any, preview: int) -> None:
    call = {"height": 160, "width": 192, "num_inference_steps": 1, "max_sequence_length": 16}
    grid = ImageGrid(5, 6, start=preview)

    def picture() -> bytes:
        return stock(SHORT, generator=torch.Generator().manual_seed(0), **call).images[0].tobytes()

    # The stock pipeline draws past the picture's codes, which its own embedding does not know.
    model.generation_config.suppress_tokens = list(range(CODES, VISION))
    try:
        full = picture()
        with headkv_mm.compress(model, "headkv", budget=1.0, image_grid=grid) as session:
            assert picture() == full
        prompt = stock_inputs(stock, [SHORT])["input_ids"].shape[1]
        assert session.report().tokens_seen == prompt + preview + GRID.tokens
        with headkv_mm.compress(model, "headkv", budget=0.5, image_grid=grid, grouping_rows=2) as session:
            small = picture()
        (cache,) = session.caches
        assert max(cache.report().lengths[0][0]) < session.report().tokens_seen
        assert small != full
        assert picture() == full
    finally:
        model.generation_config.suppress_tokens = None


def test_from_a_folder(tmp_path: Path) -> None:
    whole = glm_image_pipeline(small_preview=False)
    whole.save_pretrained(tmp_path)
    here, loaded = (
        headkv_mm.pipeline("text-to-image", model=model, image_grid=ImageGrid(2, 3), device="cpu")
        for model in (whole, tmp_path)
    )
    assert loaded.image_grid.start > 200
    out = loaded(SHORT, seed=0, kv_compression="streaming", kv_budget=5)
    assert torch.equal(out.tokens, here(SHORT, seed=0, kv_compression="streaming", kv_budget=5).tokens)
    assert out.images[0].size == (96, 64)

    def refused(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message) as caught:
            headkv_mm.pipeline("text-to-image", model=tmp_path)
        assert "\n" not in str(caught.value)

    (tmp_path / "processor" / "tokenizer.json").unlink()
    refused("cannot be read")
    weights = tmp_path / "vision_language_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("the weights in .*vision_language_encoder cannot be read")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused("of the class FluxPipeline has no autoregressive stage.*GlmImagePipeline is served")
    (tmp_path / "model_index.json").write_text("{")
    refused("model_index.json cannot be read")


def test_bad_input(pipe: Any, stock: Any, model: Any) -> None:
    for settings, message in (
        ({"guidance_scale": 3.0}, "without guidance.*functools.partial"),
        ({"negative_prompt": "blurry"}, "no effect without guidance"),
        ({"image_grid": ImageGrid(5, 6, start=7)}, r"ask for ImageGrid\(5, 6\)"),
        ({"image_grid": ImageGrid(5, 6, row_stride=7)}, "no newlines"),
        ({"image_grid": ImageGrid(1, 400)}, "ask for one less narrow"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(SHORT, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="holds '<sop>', which the processor writes"):
        pipe("a cat<sop>")
    with pytest.raises(ValueError, match="give the whole GlmImagePipeline"):
        headkv_mm.pipeline("text-to-image", model=model, processor=stock.processor)
    with pytest.raises(ValueError, match="must be a GlmImagePipeline, got object"):
        headkv_mm.pipeline("text-to-image", model=model, processor=stock.processor, image_decoder=object())
    other = copy.copy(stock)
    other.__class__ = type("FluxPipeline", (type(stock).__mro__[1],), {})
    with pytest.raises(ValueError, match="diffusers pipeline FluxPipeline has no autoregressive stage"):
        headkv_mm.pipeline("text-to-image", model=other)
