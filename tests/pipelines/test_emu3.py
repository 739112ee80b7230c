# SPDX-License-Identifier: Apache-2.0
"""Emu3: stock `generate`, newline columns, and guidance on a second cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Emu3Config, Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor

import headkv_mm
from headkv_mm import HeadKVCache, ImageGrid
from headkv_mm.memory import storage_cost
from headkv_mm.pipelines.models.base import Sampling
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

from .characters import character_tokenizer
from .image_oracle import largest_difference, masked_again, tracing

CODES, GRID = 24, ImageGrid(6, 7)
SHORT, LONG, BAD = "a cat", "a much longer dog", "blurry"
SMALL = {"kv_compression": "headkv", "kv_budget": 0.5, "kv_options": {"grouping_rows": 2}}
METHODS = [SMALL, *({"kv_compression": name, "kv_budget": 0.4} for name in ("lines", "streaming", "pointed"))]


@pytest.fixture(scope="module")
def processor() -> Emu3Processor:
    special = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
        "eol_token": "<|extra_200|>",
    }
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    return Emu3Processor(Emu3ImageProcessor(), character_tokenizer(special, last=codes))


@pytest.fixture(scope="module")
def model(processor: Emu3Processor) -> Emu3ForConditionalGeneration:
    """Random weights, wide enough that a wrong entry shows."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 200,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        "initializer_range": 0.4,
    }
    pictures = {
        "codebook_size": CODES,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    config = Emu3Config(vq_config=pictures, text_config=text, vocabulary_map=processor.tokenizer.get_vocab())
    return Emu3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def pipe(model: Any, processor: Any) -> TextToImagePipeline:
    return headkv_mm.pipeline("text-to-image", model=model, processor=processor, image_grid=GRID, device="cpu")


def stock(model: Any, processor: Any, prompts: list[str], negative: str, grid: ImageGrid = GRID) -> Tensor:
    """Greedy tokens as the documentation of Emu3 makes them."""
    size = {"ratio": f"{grid.width}:{grid.height}", "image_area": grid.height * grid.width * 64}
    made, against = (
        processor(
            text=texts, return_for_image_generation=True, padding=True, padding_side="left", return_tensors="pt", **size
        )
        for texts in (prompts, [negative] * len(prompts))
    )
    start, mapping = made["input_ids"].shape[1], model.model.vocabulary_mapping
    stride, ids = grid.width + 1, processor.tokenizer.get_vocab()

    def allowed(row: int, sequence: Tensor) -> list[int]:
        done = len(sequence) - start
        behind = [ids["<|extra_201|>"], ids["<|image end|>"], ids["</s>"]]
        if done >= grid.height * stride:
            return [behind[done - grid.height * stride]]
        return [mapping.eol_token_id] if done % stride == grid.width else mapping.image_tokens

    sequences = model.generate(
        made["input_ids"],
        attention_mask=made["attention_mask"],
        max_new_tokens=grid.height * stride + 3,
        prefix_allowed_tokens_fn=allowed,
        negative_prompt_ids=against["input_ids"],
        negative_prompt_attention_mask=against["attention_mask"],
        guidance_scale=3.0,
        do_sample=False,
    )
    return sequences[:, start : start + grid.height * stride]


def test_a_full_budget_gives_the_stock_tokens(pipe: Any, model: Any, processor: Any) -> None:
    wanted = stock(model, processor, [SHORT, LONG], BAD)
    settings = {"do_sample": False, "negative_prompt": BAD, "batch_size": 2}
    for compression in ({}, {"kv_compression": "headkv", "kv_budget": 1.0}):
        outputs = pipe([SHORT, LONG], **settings, **compression)
        assert torch.equal(torch.cat([output.tokens for output in outputs]), wanted)
    assert not torch.equal(pipe(SHORT, do_sample=False).tokens[0], wanted[0]), "the negative prompt does nothing"


def test_pictures_show_the_tokens(pipe: Any, model: Any, processor: Any) -> None:
    (image,), tokens = (made := pipe(SHORT, seed=0)).images, made.tokens
    assert (image.mode, image.size) == ("RGB", (2 * GRID.width, 2 * GRID.height))
    behind = torch.zeros(1, 3, dtype=torch.long)
    pixels = model.decode_image_tokens(image_tokens=torch.cat([tokens, behind], 1), height=6, width=7)
    wanted = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"][0]
    assert image.tobytes() == wanted.tobytes()
    assert len(image.getcolors()) > 10


def test_a_full_budget_samples_as_the_full_cache(pipe: Any) -> None:
    full = pipe(LONG, num_images=2, seed=3)
    assert not torch.equal(full.tokens[0], full.tokens[1])
    for method in ("headkv", "lines"):
        assert torch.equal(pipe(LONG, num_images=2, seed=3, kv_compression=method, kv_budget=1.0).tokens, full.tokens)


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings["kv_compression"])
def test_eviction_equals_full_caches_with_the_evicted_masked(pipe: Any, model: Any, settings: Any) -> None:
    call = {"batch_size": 2, "seed": 1, "negative_prompt": BAD}
    with tracing(model, model.lm_head) as small:
        pipe([SHORT, LONG], **call, **settings)
    assert len(small.logits) == 2 * GRID.height * (GRID.width + 1)
    pads = [[len(LONG) - len(SHORT), 0], [0, 0]]
    oracle = masked_again(model, model.lm_head, small, pads, lambda: pipe([SHORT, LONG], **call))
    assert largest_difference(small, oracle) < 1e-4
    with tracing(model, model.lm_head, again=small) as full:
        pipe([SHORT, LONG], **call)
    for branch in (0, 1):  # both branches really lost something
        pairs = zip(small.logits[branch::2], full.logits[branch::2], strict=True)
        assert max(abs(ours - theirs).max() for ours, theirs in pairs) > 1e-2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(small.positions, full.positions, strict=True))


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: settings["kv_compression"])
def test_a_batch_equals_its_prompts_alone(pipe: Any, settings: Any) -> None:
    together = pipe([SHORT, LONG], batch_size=2, seed=5, keep_tokens=True, **settings)
    for prompt, output in zip((SHORT, LONG), together, strict=True):
        alone = pipe(prompt, seed=5, keep_tokens=True, **settings)
        assert torch.equal(alone.tokens, output.tokens)
        for ours, theirs in zip(alone.kept_tokens[0], output.kept_tokens[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_both_caches_hold_what_was_budgeted(pipe: Any, model: Any) -> None:
    budget, tokens = 20, GRID.height * (GRID.width + 1)
    report = pipe(SHORT, seed=0, kv_compression="headkv", kv_budget=budget, kv_options={"grouping_rows": 2}).report
    assert len(report.caches) == 2
    prompts = [len(SHORT) + len("[6*7]") + 1, len("[6*7]") + 1]  # start, size, wrapper, and one for the whole text
    pieces = headkv_mm.Compression("headkv", budget=budget, grouping_rows=2).pieces("image")
    for cache, prompt in zip(report.caches, prompts, strict=True):
        cost = storage_cost(pieces, layers=2, rows=1, heads=4, kv_heads=2, head_dim=8, itemsize=4, condition=prompt)
        assert cache.nbytes <= cost.of(budget, GRID.width + 1)
        assert cache.nbytes_full == 2 * 2 * 2 * 8 * 4 * (prompt + tokens - 1)
        per_head = [count for layer in cache.capacities for count in layer[0]]
        assert sum(per_head) == 4 * (prompt + budget + GRID.width + 1)
    assert report.nbytes == sum(cache.nbytes for cache in report.caches) < report.nbytes_full
    full = pipe(SHORT, seed=0).report
    assert full.nbytes == full.nbytes_full == report.nbytes_full
    assert len(pipe(SHORT, seed=0, guidance_scale=1.0, **SMALL).report.caches) == 1


def test_kept_tokens_know_the_newlines(pipe: Any) -> None:
    pytest.importorskip("matplotlib")
    from headkv_mm.plots import _mask, kept_token_map

    assert pipe.image_grid == ImageGrid(6, 7, row_stride=8)
    out = pipe(SHORT, seed=0, keep_tokens=True, kv_compression="streaming", kv_budget=18)
    kept = out.kept_tokens[0][0][0]
    newline = pipe._adapter._newline.item()
    assert (out.tokens[0].view(6, 8)[:, 7] == newline).all()
    assert (out.tokens[0].view(6, 8)[:, :7] != newline).all()
    mask = _mask(kept, pipe.image_grid)
    assert mask.shape == (6, 7)
    assert mask[-1].all(), "the last row is always held"
    assert mask.sum() == sum(int(token) % 8 != 7 for token in kept) < len(kept)
    kept_token_map(out.kept_tokens[0], out.images[0], pipe.image_grid)


def test_other_grids(pipe: Any, model: Any, processor: Any) -> None:
    grid = ImageGrid(3, 5)
    out = pipe(SHORT, image_grid=grid, do_sample=False, negative_prompt=BAD)
    assert out.images[0].size == (10, 6)
    assert torch.equal(out.tokens, stock(model, processor, [SHORT], BAD, grid))
    assert pipe(SHORT, image_grid=ImageGrid(3, 5, row_stride=6), do_sample=False).tokens.shape == (1, 18)


def test_the_default_grid_is_the_processors(model: Any, processor: Any) -> None:
    assert TextToImagePipeline(model=model, processor=processor, device="cpu").image_grid == ImageGrid(90, 90, 91)


def test_from_a_folder(pipe: Any, model: Any, processor: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor") as caught:
        headkv_mm.pipeline("text-to-image", model=tmp_path)
    assert "\n" not in str(caught.value)
    processor.save_pretrained(tmp_path)
    loaded = headkv_mm.pipeline("text-to-image", model=tmp_path, image_grid=GRID, device="cpu")
    out = loaded(SHORT, seed=0, **SMALL)
    assert torch.equal(out.tokens, pipe(SHORT, seed=0, **SMALL).tokens)
    assert out.images[0].size == (14, 12)


def test_compress_around_the_stock_loop(pipe: Any, model: Any, processor: Any) -> None:
    full = stock(model, processor, [SHORT, LONG], BAD)
    grid = ImageGrid(6, 7, row_stride=8)
    with headkv_mm.compress(model, "headkv", budget=1.0, image_grid=grid) as session:
        assert torch.equal(stock(model, processor, [SHORT, LONG], BAD), full)
        assert len(session.caches) == 2
    with headkv_mm.compress(model, "headkv", budget=0.5, image_grid=grid, grouping_rows=2) as session:
        small = stock(model, processor, [SHORT, LONG], BAD)
    assert all(cache.nbytes < cache.nbytes_full for cache in session.caches)
    ours = pipe([SHORT, LONG], batch_size=2, do_sample=False, negative_prompt=BAD, **SMALL)
    assert torch.equal(torch.cat([output.tokens for output in ours]), small)
    assert torch.equal(stock(model, processor, [SHORT, LONG], BAD), full), "nothing stays behind"


def test_threads_do_not_meet(pipe: Any) -> None:
    jobs = [{"seed": 1, **SMALL}, {"seed": 2}, {"seed": 3, **SMALL, "image_grid": ImageGrid(4, 4)}]
    wanted = [pipe(LONG, **job).tokens for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: pipe(LONG, **job).tokens, jobs))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted))


def test_settings_are_the_published_ones(pipe: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = pipe(SHORT, seed=0).report.settings
    assert settings == {"guidance_scale": 3.0, "do_sample": True, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}
    monkeypatch.setattr(model.generation_config, "top_k", 5)
    assert pipe(SHORT, seed=0, top_p=0.5).report.settings == {**settings, "top_k": 5, "top_p": 0.5}
    assert torch.equal(pipe(SHORT, seed=0, top_k=1).tokens, pipe(SHORT, do_sample=False).tokens)


def test_bad_input(pipe: Any, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in (
        ({"image_grid": ImageGrid(20, 20)}, "takes 420 tokens with its newlines.*context holds 200"),
        ({"image_grid": ImageGrid(6, 7, start=3)}, r"ask for ImageGrid\(6, 7\)"),
        ({"image_grid": ImageGrid(6, 7, row_stride=9)}, "one newline behind each row"),
        ({"negative_prompt": "<image>"}, "the processor writes itself"),
        ({"negative_prompt": BAD, "guidance_scale": 1}, "no effect without guidance"),
        ({"image_grid": ImageGrid(13, 13)}, "prompt and image take"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(LONG, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"holds '<.image start.>', which the processor writes"):
        pipe("a cat<|image start|>")
    with pytest.raises(ValueError, match="pass processor="):
        TextToImagePipeline(model=model, device="cpu")
    with pytest.raises(ValueError, match="turn tokens into pictures themselves"):
        TextToImagePipeline(model=model, processor=processor, image_decoder=object(), device="cpu")
    monkeypatch.setattr(model.config, "vocabulary_map", {"a": 1})
    with pytest.raises(ValueError, match="names no image tokens"):
        TextToImagePipeline(model=model, processor=processor, device="cpu")


def test_the_caches_are_what_was_asked_for(pipe: Any) -> None:
    adapter = pipe._adapter
    for compression, kind in (("headkv", HeadKVCache), ("none", DynamicCache)):
        on_token = mock.Mock()
        made = adapter.generate(
            adapter.encode([SHORT], grid=pipe.image_grid),
            sampling=adapter.effective_sampling(Sampling()),
            seeds=[0],
            compression=headkv_mm.Compression(compression, budget=0.5),
            on_token=on_token,
        )
        assert [type(cache) for cache in made.caches] == [kind, kind]
        assert on_token.call_count == made.tokens.shape[1] == 48
