# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from headkv_mm.compression import Compression
from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens
from headkv_mm.pipelines.outputs import ImageOutput
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

SHORT = "red circle top on white"
LONG = "blue square bottom-right, same ring left, same cross center on black"
# 32 of 64 image tokens: more than a row and two tokens, less than everything.
COMPRESSED = {"kv_compression": "headkv", "kv_budget": 0.5, "kv_options": {"grouping_rows": 2}}


def test_one_prompt_gives_one_output(pipe: TextToImagePipeline) -> None:
    out = pipe(SHORT, num_images=3, seed=5)
    assert isinstance(out, ImageOutput)
    assert [image.size for image in out.images] == [(16, 16)] * 3
    assert {image.mode for image in out.images} == {"RGB"}
    assert out.seeds == [5, 6, 7]
    assert out.prompts == [SHORT] * 3
    assert out.tokens.shape == (3, 64)
    assert len({tuple(tokens.tolist()) for tokens in out.tokens}) == 3


def test_image_shows_its_tokens(pipe: TextToImagePipeline, tiny_model: Any) -> None:
    out = pipe(SHORT, seed=0)
    for cell in (0, 7, 63):
        row, column = divmod(cell, 8)
        colour = tuple(tiny_model.patch_decoder.codebook[out.tokens[0, cell], 0, 0].tolist())
        assert out.images[0].getpixel((2 * column, 2 * row)) == colour


def test_the_prompt_matters(pipe: TextToImagePipeline) -> None:
    assert not torch.equal(pipe(SHORT, seed=0).tokens, pipe(LONG, seed=0).tokens)


@pytest.mark.parametrize("settings", [{}, COMPRESSED, {**COMPRESSED, "guidance_scale": 2.0}], ids=str)
def test_image_does_not_depend_on_the_batch(pipe: TextToImagePipeline, settings: dict[str, Any]) -> None:
    alone = [pipe(prompt, seed=seed, **settings).tokens[0] for prompt in (SHORT, LONG) for seed in (3, 4)]
    together = pipe([SHORT, LONG], num_images=2, batch_size=4, seed=3, **settings)
    assert [output.report.images for output in together] == [4, 4]
    for ours, wanted in zip(torch.cat([output.tokens for output in together]), alone):
        assert torch.equal(ours, wanted)


def test_batches_that_cut_through_prompts(pipe: TextToImagePipeline) -> None:
    wanted = pipe([SHORT, LONG], num_images=2, seed=0)
    outputs = pipe([SHORT, LONG], num_images=2, seed=0, batch_size=3, **COMPRESSED)
    assert [(output.report.runs, output.report.images) for output in outputs] == [(1, 3), (2, 4)]
    assert [output.seeds for output in outputs] == [[0, 1], [0, 1]]
    outputs = pipe([SHORT, LONG], num_images=2, seed=0, batch_size=3)
    assert all(torch.equal(output.tokens, other.tokens) for output, other in zip(outputs, wanted))


def test_seeds_may_be_listed(pipe: TextToImagePipeline) -> None:
    out = pipe(SHORT, num_images=2, seed=[9, 2])
    assert out.seeds == [9, 2]
    assert torch.equal(out.tokens[1], pipe(SHORT, seed=2).tokens[0])


def test_seeds_are_drawn_and_reported(pipe: TextToImagePipeline) -> None:
    torch.manual_seed(1)
    first, second = pipe(SHORT), pipe(SHORT)
    assert first.seeds != second.seeds
    assert torch.equal(first.tokens, pipe(SHORT, seed=first.seeds[0]).tokens)
    torch.manual_seed(1)
    assert pipe(SHORT).seeds == first.seeds


def test_lazy_input_gives_lazy_output(pipe: TextToImagePipeline) -> None:
    read = []

    def prompts() -> Iterator[str]:
        for prompt in (SHORT, LONG, SHORT):
            read.append(prompt)
            yield prompt

    outputs = pipe(prompts(), seed=0)
    assert read == []
    assert next(outputs).prompts == [SHORT]
    assert read == [SHORT]
    assert len(list(outputs)) == 2


def test_no_compression_is_the_models_own_generation(pipe: TextToImagePipeline, tiny_model: Any) -> None:
    encoded = pipe.tokenizer([LONG], padding="max_length", return_tensors="pt")
    wanted = tiny_model.generate(encoded["input_ids"], encoded["attention_mask"], seeds=[0])
    assert torch.equal(pipe(LONG, seed=0).tokens, wanted)
    assert torch.equal(pipe(LONG, seed=0, kv_compression="headkv", kv_budget=1.0).tokens, wanted)


def test_compression_holds_fewer_bytes(pipe: TextToImagePipeline) -> None:
    full, small = pipe(LONG, seed=0).report, pipe(LONG, seed=0, **COMPRESSED).report
    columns = pipe.model.config.max_prompt_length + 63  # the last token is never stored
    assert full.nbytes == full.nbytes_full == small.nbytes_full == 2 * 2 * 2 * 8 * 4 * columns
    assert full.ratio == 1.0
    assert small.nbytes <= small.nbytes_peak < full.nbytes
    assert small.nbytes_saved == small.nbytes_full - small.nbytes
    assert small.local_share is not None
    assert sum(small.head_types.values()) == 4
    assert small.tokens == 64
    assert small.tokens_per_second == pytest.approx(64 / small.seconds)


@pytest.mark.parametrize("method", ["none", "headkv", "lines", "streaming"])
def test_report_is_plain_json(pipe: TextToImagePipeline, method: str) -> None:
    budget = None if method == "none" else 0.5
    report = pipe(SHORT, seed=0, top_k=5, kv_compression=method, kv_budget=budget).report
    read = json.loads(json.dumps(report.to_dict()))
    assert read["method"] == method
    assert read["settings"]["top_k"] == 5
    assert read["ratio"] == report.ratio
    assert len(read["caches"]) == (0 if method == "none" else 1)
    assert str(report).startswith("full cache" if method == "none" else f"{method} 1/2")


def test_kept_tokens(pipe: TextToImagePipeline) -> None:
    out = pipe([SHORT, LONG], seed=0, batch_size=2, keep_tokens=True, guidance_scale=2.0, **COMPRESSED)
    for image, (output, condition) in enumerate(zip(out, (7, 15))):
        assert output.kept_tokens is not None
        (kept,) = output.kept_tokens
        for layer, heads in enumerate(kept):
            for head, tokens in enumerate(heads):
                assert tokens.tolist() == sorted(set(tokens.tolist()))
                assert set(range(56, 63)) <= set(tokens.tolist()), "the last row is always held"
                assert len(tokens) + condition == output.report.caches[0].lengths[layer][image][head]
    everything = pipe(SHORT, seed=0, keep_tokens=True).kept_tokens
    assert everything is not None
    assert everything[0][1][1].tolist() == list(range(63))
    assert pipe(SHORT, seed=0).kept_tokens is None


def test_a_call_overrides_the_pipeline(
    tiny_model: Any, pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = TextToImagePipeline(model=tiny_model, device="cpu", seed=0, num_images=2, top_k=3, **COMPRESSED)
    out = ours(SHORT)
    assert out.seeds == [0, 1]
    assert (out.report.settings["top_k"], out.report.options) == (3, {"grouping_rows": 2})
    off = ours(SHORT, num_images=1, top_k=0, kv_compression="none")
    assert off.report.method == "none"
    assert torch.equal(off.tokens, pipe(SHORT, seed=0).tokens)

    asked: dict[str, Any] = {}

    def generate(prompts: EncodedPrompts, **run: Any) -> GeneratedTokens:
        asked.update(run)
        return GeneratedTokens(torch.zeros(len(run["seeds"]), 64, dtype=torch.long))

    monkeypatch.setattr(ours._adapter, "generate", generate)
    for call, wanted in (
        ({}, Compression("headkv", budget=0.5, grouping_rows=2)),
        ({"kv_budget": 0.75}, Compression("headkv", budget=0.75, grouping_rows=2)),
        ({"kv_budget": "3/4"}, Compression("headkv", budget=0.75, grouping_rows=2)),
        ({"kv_options": {"tau": 0.5}}, Compression("headkv", budget=0.5, grouping_rows=2, tau=0.5)),
        ({"kv_compression": "lines"}, Compression("lines", budget=0.5)),
        ({"kv_compression": {"method": "streaming", "budget": 40}}, Compression("streaming", budget=40)),
        ({"kv_compression": Compression("headkv", budget=0.9)}, Compression("headkv", budget=0.9)),
        ({"kv_compression": "none"}, Compression("none")),
        ({"kv_compression": None}, Compression("none")),
        ({}, Compression("headkv", budget=0.5, grouping_rows=2)),
    ):
        ours(SHORT, **call)
        assert asked["compression"] == wanted, call
    ours(SHORT, top_p=0.9, seed=7, num_images=1)
    assert (asked["sampling"].top_k, asked["sampling"].top_p, asked["seeds"]) == (3, 0.9, [7])


def test_sampling_settings_matter(pipe: TextToImagePipeline) -> None:
    plain = pipe(LONG, seed=0).tokens
    best = pipe(LONG, do_sample=False).tokens
    assert torch.equal(pipe(LONG, seed=1, top_k=1).tokens, best)
    for settings in ({"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.3}, {"guidance_scale": 4.0}):
        assert not torch.equal(pipe(LONG, seed=0, **settings).tokens, plain), settings
    assert torch.equal(pipe(LONG, seed=0, guidance_scale=1).tokens, plain)


def test_negative_prompt(pipe: TextToImagePipeline) -> None:
    guided = pipe(LONG, seed=0, guidance_scale=3.0).tokens
    assert not torch.equal(pipe(LONG, seed=0, guidance_scale=3.0, negative_prompt=SHORT).tokens, guided)
    # Guidance away from the prompt itself changes nothing.
    same = pipe(LONG, seed=0, guidance_scale=3.0, negative_prompt=LONG).tokens
    assert torch.equal(same, pipe(LONG, seed=0).tokens)


def test_progress_goes_to_stderr(pipe: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(SHORT, seed=0)
    assert capsys.readouterr() == ("", "")
    pipe([SHORT, LONG], seed=0, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "/128" in captured.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_compression": "headvk"}, "unknown method 'headvk'.*headkv"),
        ({"kv_compression": "headkv", "kv_options": {"tao": 1}}, "no option 'tao'.*tau"),
        ({"kv_compression": "headkv", "kv_budget": 0}, "budget 0"),
        ({"kv_compression": "headkv", "kv_budget": -0.5}, "budget -0.5"),
        ({"kv_compression": "headkv", "kv_budget": 1.5}, "budget 1.5"),
        ({"kv_compression": "headkv", "kv_budget": "lots"}, "'lots' is not understood"),
        ({"kv_compression": "headkv", "kv_budget": 0.1}, "fewer than one row"),
        ({"kv_budget": 0.5}, "kv_budget has no effect without kv_compression"),
        ({"kv_options": {"tau": 0.5}}, "kv_options has no effect without kv_compression"),
        ({"negative_prompt": SHORT}, "negative_prompt has no effect without guidance"),
        ({"negative_prompt": SHORT, "guidance_scale": 1.0}, "negative_prompt has no effect without guidance"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"num_images": 0}, "num_images must be a positive integer"),
        ({"seed": -1}, "seed must be in 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 image per prompt"),
        ({"seed": []}, "empty list"),
    ],
    ids=str,
)
def test_bad_settings(tiny_model: Any, pipe: TextToImagePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe(SHORT, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline(model=tiny_model, device="cpu", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 20}, "no argument 'steps'"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"kv_compression": "headkv", "kv_options": "tau=1"}, "kv_options must be a dict"),
    ],
    ids=str,
)
def test_wrong_types(pipe: TextToImagePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pipe(SHORT, **settings)


def test_bad_prompts(pipe: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        pipe("  ")
    with pytest.raises(ValueError, match="empty list of prompts"):
        pipe([])
    with pytest.raises(TypeError, match="prompt must be text, got int"):
        pipe([SHORT, 3])
    with pytest.raises(ValueError, match="zebra"):
        pipe("a zebra top on white")
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        pipe(SHORT, batch_size=0)


def test_a_bad_prompt_is_found_before_any_image(pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe._adapter, "generate", lambda *args, **kwargs: pytest.fail("an image was generated"))
    with pytest.raises(ValueError, match="zebra"):
        pipe([SHORT, "a zebra top on white"])


def test_an_image_grid_must_be_the_models(pipe: TextToImagePipeline) -> None:
    from headkv_mm.image_grid import ImageGrid

    assert pipe(SHORT, seed=0, image_grid=ImageGrid(8, 8)).tokens.shape == (1, 64)
    with pytest.raises(ValueError, match="draws images of 8x8 tokens and cannot draw 16x16"):
        pipe(SHORT, image_grid=ImageGrid(16, 16))


def test_threads_do_not_meet(pipe: TextToImagePipeline) -> None:
    from concurrent.futures import ThreadPoolExecutor

    jobs = [{"seed": 1, **COMPRESSED}, {"seed": 2}, {"seed": 3, **COMPRESSED}]
    wanted = [pipe(LONG, **job).tokens for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: pipe(LONG, **job).tokens, jobs))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted))


def test_compress_around_a_pipeline_without_compression(pipe: TextToImagePipeline) -> None:
    from headkv_mm import compress

    wanted = pipe(LONG, seed=0, **COMPRESSED)
    with compress(pipe.model, "headkv", budget=0.5, grouping_rows=2) as session:
        found = pipe(LONG, seed=0, kv_compression=None)
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.report.method == "headkv"
    assert found.report.nbytes == session.report().nbytes == wanted.report.nbytes
