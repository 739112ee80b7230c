# SPDX-License-Identifier: Apache-2.0
"""Janus: our loop is transformers' own, and compresses; positions, batches, bytes and pictures."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import headkv_mm
from headkv_mm import Compression, ImageGrid, plan_memory
from headkv_mm.pipelines.models.base import Sampling
from headkv_mm.pipelines.models.janus import JanusAdapter
from headkv_mm.pipelines.models.pictures import to_picture

from . import adapter_checks as checks
from . import tiny_image_models as tiny

METHODS = ("headkv", "lines", "streaming", "pointed")
PROMPTS = ["a cat", "a much longer dog"]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny.janus()


@pytest.fixture(scope="module")
def adapter(parts: tuple[Any, Any]) -> JanusAdapter:
    return JanusAdapter(parts[0], processor=parts[1])


@pytest.fixture(scope="module")
def pipe(parts: tuple[Any, Any]) -> Any:
    return headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1])


@pytest.fixture(scope="module")
def head(parts: tuple[Any, Any]) -> Any:
    return parts[0].model.generation_head


def stock(parts: tuple[Any, Any], text: list[str], **settings: Any) -> torch.Tensor:
    model, processor = parts
    inputs = processor(text=text, generation_mode="image", padding=True, return_tensors="pt")
    return model.generate(**inputs, generation_mode="image", **settings)


def stock_works(parts: tuple[Any, Any]) -> bool:
    try:
        stock(parts, ["a"], do_sample=False, guidance_scale=3.0)
    except (TypeError, AttributeError, IndexError, RuntimeError, ValueError):  # some versions are broken here
        return False
    return True


def test_ids_are_those_of_the_processor(parts: tuple[Any, Any], adapter: JanusAdapter) -> None:
    theirs = parts[1](text=PROMPTS, generation_mode="image", padding=True, return_tensors="pt")
    ours = adapter.encode(PROMPTS)
    assert torch.equal(ours.inputs["input_ids"], theirs["input_ids"])
    assert torch.equal(ours.inputs["attention_mask"], theirs["attention_mask"])
    assert ours.condition_lengths.tolist() == [7, 19]
    # The unconditional rows keep <s> and <boi> only.
    assert ours.inputs["negative_ids"][1].tolist() == [1, *[0] * 17, adapter._boi]
    assert torch.equal(ours.inputs["negative_mask"], theirs["attention_mask"])


@pytest.mark.parametrize("prompts", [["a cat", "a dog"], PROMPTS])
@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_the_full_cache_gives_stock_tokens(
    parts: tuple[Any, Any], pipe: Any, guidance: float, prompts: list[str]
) -> None:
    if not stock_works(parts):
        pytest.skip("this transformers cannot generate images with Janus")
    theirs = stock(parts, prompts, do_sample=False, guidance_scale=guidance)
    ours = pipe(prompts, batch_size=2, do_sample=False, guidance_scale=guidance)
    assert torch.equal(theirs, torch.cat([item.tokens for item in ours]))
    assert len(theirs.unique()) > 5


def test_scores_are_those_of_one_pass_without_a_cache(parts: tuple[Any, Any], adapter: JanusAdapter, head: Any) -> None:
    model = parts[0]
    prompts = adapter.encode(PROMPTS[:1])
    run = checks.watch(adapter, prompts, head)
    ids = torch.cat([prompts.inputs["input_ids"], prompts.inputs["negative_ids"]])
    with torch.no_grad():
        image = model.prepare_embeddings_for_image_generation(run.made.tokens[:, :-1].expand(2, -1))
        embeddings = torch.cat([model.get_input_embeddings()(ids), image], dim=1)
        hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        expected = model.model.generation_head(hidden[:, ids.shape[1] - 1 :])  # [2, 36, codes]
    assert (run.scores.transpose(0, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_full_budget_changes_nothing(pipe: Any, method: str, guidance: float) -> None:
    settings = {"batch_size": 2, "seed": 3, "guidance_scale": guidance}
    full = pipe(PROMPTS, **settings)
    ours = pipe(PROMPTS, kv_compression=method, kv_budget=1.0, **settings)
    for one, other in zip(full, ours, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.images[0].tobytes() == other.images[0].tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_is_a_full_cache_with_the_evicted_masked(adapter: JanusAdapter, head: Any, method: str) -> None:
    prompts = adapter.encode(PROMPTS)
    run = checks.watch(adapter, prompts, head, Compression(method, budget=0.25))
    expected = checks.oracle_scores(adapter, prompts, head, run, [12, 0, 12, 0])
    assert run.scores.shape[1] == 4  # both branches
    assert (run.scores - expected).abs().max() < 1e-4
    full = checks.full_scores(adapter, prompts, head, run)
    for branch in (slice(0, 2), slice(2, 4)):
        assert (run.scores - full)[:, branch].abs().max() > 1e-2


def test_positions_go_on_to_the_last_token(adapter: JanusAdapter, head: Any) -> None:
    prompts = adapter.encode(PROMPTS)
    small = checks.watch(adapter, prompts, head, Compression("headkv", budget=0.25))
    full = checks.watch(adapter, prompts, head)
    ours, theirs = small.trace.positions, full.trace.positions
    assert len(ours) == len(theirs) == 36
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert ours[-1][:, 0].tolist() == [7 + 34, 19 + 34] * 2


@pytest.mark.parametrize("negative", [None, "ugly"])
def test_a_batch_equals_its_prompts_alone(pipe: Any, negative: str | None) -> None:
    settings = {"seed": 5, "kv_compression": "headkv", "kv_budget": 0.25, "keep_tokens": True}
    settings["negative_prompt"] = negative
    together = pipe(PROMPTS, batch_size=2, **settings)
    for prompt, mine in zip(PROMPTS, together, strict=True):
        alone = pipe(prompt, **settings)
        assert torch.equal(alone.tokens, mine.tokens)
        assert alone.images[0].tobytes() == mine.images[0].tobytes()
        for layer, other in zip(alone.kept_tokens[0], mine.kept_tokens[0], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(layer, other, strict=True))
            assert all(0 < len(one) < 36 and one.max() < 36 for one in layer)


def test_a_negative_prompt_takes_the_place_of_the_unconditional_rows(adapter: JanusAdapter, pipe: Any) -> None:
    ids = adapter.encode(["a cat"], "blue")
    assert torch.equal(ids.inputs["negative_ids"], adapter.encode(["blue"]).inputs["input_ids"])
    plain = pipe("a cat", do_sample=False).tokens
    assert not torch.equal(plain, pipe("a cat", negative_prompt="blue", do_sample=False).tokens)
    # Led away from itself, a prompt is drawn as without guidance.
    same = pipe("a cat", negative_prompt="a cat", do_sample=False).tokens
    assert torch.equal(same, pipe("a cat", guidance_scale=1, do_sample=False).tokens)
    with pytest.raises(ValueError, match="no effect without guidance"):
        pipe("a cat", negative_prompt="blue", guidance_scale=1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_bytes_are_as_planned(parts: tuple[Any, Any], pipe: Any, guidance: float) -> None:
    out = pipe("a cat", kv_compression="headkv", kv_budget=9, guidance_scale=guidance)
    rows = 1 if guidance == 1 else 2
    plan = plan_memory(parts[0], "headkv", budget=9, rows=rows, condition=7)
    assert plan.nbytes == rows * 2 * 2 * (7 + 9 + 6) * 8 * 2 * 4  # layers, heads, entries, width, K and V, float32
    assert plan.nbytes < out.report.nbytes <= plan.nbytes + plan.bookkeeping
    assert out.report.nbytes_full == rows * 2 * 2 * (7 + 35) * 8 * 2 * 4
    full = pipe("a cat", guidance_scale=guidance).report
    assert full.nbytes == full.nbytes_full == out.report.nbytes_full


def test_from_a_folder(parts: tuple[Any, Any], pipe: Any, tmp_path: Path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = headkv_mm.pipeline("text-to-image", model=tmp_path)
    mine, theirs = loaded("a cat", seed=1, num_images=2), pipe("a cat", seed=1, num_images=2)
    assert torch.equal(mine.tokens, theirs.tokens)
    assert all(isinstance(image, Image.Image) and image.size == (12, 12) for image in mine.images)
    again = type(model).from_pretrained(tmp_path)  # an object knows the folder that it came from
    assert torch.equal(headkv_mm.pipeline("text-to-image", model=again)("a cat", seed=1).tokens, mine.tokens[:1])


def test_a_folder_without_a_processor(parts: tuple[Any, Any], tmp_path: Path) -> None:
    parts[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has .*no processor.*pass processor=") as error:
        headkv_mm.pipeline("text-to-image", model=str(tmp_path))
    assert "\n" not in str(error.value)
    parts[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no processor"):
        headkv_mm.pipeline("text-to-image", model=str(tmp_path))


def test_what_cannot_be_drawn(parts: tuple[Any, Any], pipe: Any) -> None:
    with pytest.raises(ValueError, match="pass processor="):
        headkv_mm.pipeline("text-to-image", model=parts[0])
    with pytest.raises(ValueError, match="image token of the model's own"):
        pipe("a cat <boi>")
    with pytest.raises(ValueError, match="a prompt of 302 tokens and an image of 36 are longer than the 256 positions"):
        pipe("a" * 300)
    with pytest.raises(ValueError, match="draws images of 6x6 tokens and cannot draw 4x6"):
        pipe("a cat", image_grid=ImageGrid(4, 6))
    with pytest.raises(ValueError, match="leave image_decoder out"):
        headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1], image_decoder=len)


def test_a_chat_template_is_used(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    template = "{% for m in messages %}U,{{ m.content[0].text }}{% endfor %}{% if add_generation_prompt %}A,{% endif %}"
    chatty = type(processor)(processor.image_processor, processor.tokenizer, chat_template=template)
    ids = JanusAdapter(model, processor=chatty).encode(["cat"]).inputs["input_ids"][0]
    assert processor.tokenizer.decode(ids).replace(" ", "") == "<s>U,catA,<boi>"


def test_defaults_come_from_the_generation_config(adapter: JanusAdapter, pipe: Any, parts: tuple[Any, Any]) -> None:
    out = pipe("a cat", seed=0)
    assert out.report.settings["guidance_scale"] == 3.0
    assert out.report.settings["do_sample"] is True
    plain = type(parts[0].generation_config)()
    assert adapter.effective_sampling(Sampling()).guidance_scale == 3.0
    assert Sampling().completed(plain, guidance_scale=5.0).guidance_scale == 5.0


def test_stock_generation_is_compressed_inside_a_context(parts: tuple[Any, Any], pipe: Any) -> None:
    if not stock_works(parts):
        pytest.skip("this transformers cannot generate images with Janus")
    with headkv_mm.compress(parts[0], "headkv", budget=0.25) as session:
        theirs = stock(parts, ["a cat"], do_sample=False, guidance_scale=3.0)
    ours = pipe("a cat", do_sample=False, kv_compression="headkv", kv_budget=0.25)
    assert torch.equal(theirs, ours.tokens)
    assert session.report().nbytes == ours.report.nbytes
    assert not torch.equal(theirs, pipe("a cat", do_sample=False).tokens)


def test_threads_do_not_meet(pipe: Any) -> None:
    asked = [("headkv", 0.25), ("lines", 0.5), ("none", None)]
    alone = [pipe("a cat", seed=2, kv_compression=name, kv_budget=budget).tokens for name, budget in asked]
    found: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        name, budget = asked[index]
        found[index] = pipe("a cat", seed=2, kv_compression=name, kv_budget=budget).tokens

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], tokens) for index, tokens in enumerate(alone))


def test_both_layouts_of_pixels() -> None:
    pixels = torch.linspace(-1.5, 1.5, 4 * 5 * 3).view(4, 5, 3)
    assert to_picture(pixels).size == (5, 4)
    assert to_picture(pixels).tobytes() == to_picture(pixels.permute(2, 0, 1)).tobytes()
    assert to_picture(pixels).getpixel((0, 0))[0] == 0
    assert to_picture(pixels).getpixel((4, 3))[2] == 255
    with pytest.raises(ValueError, match="expected pixels"):
        to_picture(pixels[..., :2])
