# SPDX-License-Identifier: Apache-2.0
"""Anole and Lumina-mGPT: image scores beside transformers' masked ones, both layouts, compression, image decoders."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

import headkv_mm
from headkv_mm import Compression, ImageGrid, plan_memory
from headkv_mm.pipelines.models.chameleon import ChameleonAdapter
from headkv_mm.pipelines.models.image_decoder import image_decoder

from . import adapter_checks as checks
from . import tiny_image_models as tiny

METHODS = ("headkv", "lines", "streaming", "pointed")
PROMPTS = ["a cat", "a much longer dog"]
LUMINA = ImageGrid(8, 4, row_stride=5)
GRIDS = [pytest.param(None, id="anole"), pytest.param(LUMINA, id="lumina")]
CODES = 24


def grey(codes: Tensor) -> Tensor:
    """A decoder: code c is grey level 10 c, two pixels high and wide."""
    pixels = codes.repeat_interleave(2, 1).repeat_interleave(2, 2) * 10
    return pixels[..., None].expand(-1, -1, -1, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny.chameleon()


@pytest.fixture(scope="module")
def adapter(parts: tuple[Any, Any]) -> ChameleonAdapter:
    return ChameleonAdapter(parts[0], processor=parts[1], image_decoder=grey)


@pytest.fixture(scope="module")
def pipe(parts: tuple[Any, Any]) -> Any:
    return headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1], image_decoder=grey)


@pytest.fixture(scope="module")
def head(parts: tuple[Any, Any]) -> Any:
    return parts[0].lm_head


def ids_of(processor: Any, words: list[str]) -> list[int]:
    return processor.tokenizer.convert_tokens_to_ids(words)


def test_anoles_prompt_is_the_processors_and_a_begun_image(parts: tuple[Any, Any], adapter: ChameleonAdapter) -> None:
    processor = parts[1]
    theirs = processor(text=PROMPTS, padding=True, return_tensors="pt")  # ends the user's turn
    ours = adapter.encode(PROMPTS)
    assert torch.equal(ours.inputs["input_ids"][:, :-1], theirs["input_ids"])
    assert torch.equal(ours.inputs["attention_mask"][:, :-1], theirs["attention_mask"])
    begin, start = ids_of(processor, ["<racm3:break>", "<s>"])
    assert (ours.inputs["input_ids"][:, -1] == begin).all()
    assert ours.inputs["negative_ids"].tolist() == [[start, begin]] * 2
    assert ours.condition_lengths.tolist() == [8, 20]
    assert ours.grid == ImageGrid(6, 6)


def test_lumina_says_the_size_in_words_and_in_tokens(parts: tuple[Any, Any], adapter: ChameleonAdapter) -> None:
    processor = parts[1]
    ours = adapter.encode(["a cat"], grid=LUMINA)
    text = "Generate an image of 64x128 according to the following prompt:\na cat"
    header = ids_of(processor, ["<racm3:break>", "<reserved08804>", "<reserved08802>"])  # 8 and 4 tokens, by twos
    turn = ids_of(processor, ["<reserved08706>"])
    assert ours.inputs["input_ids"].tolist() == [[*processor.tokenizer(text)["input_ids"], *turn, *header]]
    assert ours.inputs["negative_ids"].tolist() == [header]


def test_scores_are_stock_on_words_and_stock_before_its_mask_on_images(
    parts: tuple[Any, Any], adapter: ChameleonAdapter, head: Any
) -> None:
    model = parts[0]
    prompts = adapter.encode(["a cat"])
    run = checks.watch(adapter, prompts, head, guidance_scale=1)
    whole = torch.cat([prompts.inputs["input_ids"], run.made.tokens[:, :-1]], dim=1)
    raw: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: raw.append(output.clone()))
    with torch.no_grad():
        stock = model(whole, use_cache=False).logits[0, 7:]  # [36, vocabulary]
    hook.remove()
    ours = run.scores[:, 0]
    words = torch.ones(ours.shape[1], dtype=torch.bool)
    words[model.model.vocabulary_mapping.image_tokens] = False
    assert (ours - stock)[:, words].abs().max() < 1e-4
    assert (stock[:, ~words] == torch.finfo(stock.dtype).min).all()
    assert (ours - raw[0][0, 7:]).abs().max() < 1e-4


class OnlyImages(LogitsProcessor):
    """Brings back what the head gave before the stock mask, and rules everything but image tokens out."""

    def __init__(self, head: Any, image_tokens: list[int]) -> None:
        self.image_tokens = image_tokens
        self.hook = head.register_forward_hook(self.keep)

    def keep(self, module: Any, args: Any, output: Tensor) -> None:
        self.raw = output[:, -1].clone()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = torch.full_like(self.raw, -torch.inf)
        allowed[:, self.image_tokens] = self.raw[:, self.image_tokens]
        return allowed


def test_the_full_cache_gives_the_tokens_of_stock_generate(parts: tuple[Any, Any], pipe: Any, head: Any) -> None:
    model = parts[0]
    inputs = pipe._adapter.encode(["a cat", "a dog"]).inputs
    only = OnlyImages(head, model.model.vocabulary_mapping.image_tokens)
    try:
        stock = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=36,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[only],
        )
    finally:
        only.hook.remove()
    ours = pipe(["a cat", "a dog"], batch_size=2, do_sample=False, guidance_scale=1)
    assert torch.equal(stock[:, -36:], torch.cat([item.tokens for item in ours]))
    assert len(stock[:, -36:].unique()) > 5


@pytest.mark.parametrize("grid", GRIDS)
def test_guidance_is_the_formula_on_two_passes_without_a_cache(
    parts: tuple[Any, Any], pipe: Any, grid: ImageGrid | None
) -> None:
    model, adapter = parts[0], pipe._adapter
    prompts = adapter.encode(["a cat"], grid=grid)
    tokens = pipe("a cat", image_grid=grid, do_sample=False, guidance_scale=2.5).tokens
    images = torch.tensor(model.model.vocabulary_mapping.image_tokens)

    def scores(name: str) -> Tensor:
        ids = torch.cat([prompts.inputs[name], tokens[:, :-1]], dim=1)
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state[0, prompts.inputs[name].shape[1] - 1 :]
            return model.lm_head(hidden)[:, images]

    conditional, unconditional = scores("input_ids"), scores("negative_ids")
    best = images[(unconditional + 2.5 * (conditional - unconditional)).argmax(-1)]
    if grid is not None:
        newline = ids_of(parts[1], ["<reserved08799>"])[0]
        best.view(8, 5)[:, 4] = newline
        assert (tokens.view(8, 5)[:, :4] != newline).all()
    assert torch.equal(best, tokens[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_full_budget_changes_nothing(pipe: Any, method: str, grid: ImageGrid | None) -> None:
    settings = {"batch_size": 2, "seed": 3, "image_grid": grid}
    full = pipe(PROMPTS, **settings)
    ours = pipe(PROMPTS, kv_compression=method, kv_budget=1.0, **settings)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(full, ours, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_small_budget_is_a_full_cache_with_the_evicted_masked(
    adapter: ChameleonAdapter, head: Any, method: str, grid: ImageGrid | None
) -> None:
    prompts = adapter.encode(PROMPTS, grid=grid)
    longest = prompts.inputs["input_ids"].shape[1]
    short = longest - prompts.inputs["negative_ids"].shape[1]
    run = checks.watch(adapter, prompts, head, Compression(method, budget=0.25))
    expected = checks.oracle_scores(adapter, prompts, head, run, [12, 0, short, short])
    assert run.scores.shape[:2] == (adapter.grid.tokens if grid is None else 40, 4)
    assert (run.scores - expected).abs().max() < 1e-4
    full = checks.full_scores(adapter, prompts, head, run)
    for branch in (slice(0, 2), slice(2, 4)):
        assert (run.scores - full)[:, branch].abs().max() > 1e-2


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_go_on_to_the_last_token(adapter: ChameleonAdapter, head: Any, grid: ImageGrid | None) -> None:
    prompts = adapter.encode(PROMPTS, grid=grid)
    small = checks.watch(adapter, prompts, head, Compression("headkv", budget=0.25)).trace.positions
    full = checks.watch(adapter, prompts, head).trace.positions
    steps = prompts.grid.tokens
    assert len(small) == len(full) == steps
    assert all(torch.equal(one, other) for one, other in zip(small, full, strict=True))
    lengths = [*prompts.condition_lengths.tolist(), *[prompts.inputs["negative_ids"].shape[1]] * 2]
    assert small[-1][:, 0].tolist() == [length + steps - 2 for length in lengths]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("negative", [None, "ugly"])
def test_a_batch_equals_its_prompts_alone(pipe: Any, grid: ImageGrid | None, negative: str | None) -> None:
    settings = {"seed": 5, "kv_compression": "headkv", "kv_budget": 0.25, "keep_tokens": True, "image_grid": grid}
    settings["negative_prompt"] = negative
    together = pipe(PROMPTS, batch_size=2, **settings)
    for prompt, mine in zip(PROMPTS, together, strict=True):
        alone = pipe(prompt, **settings)
        assert torch.equal(alone.tokens, mine.tokens)
        assert alone.images[0].tobytes() == mine.images[0].tobytes()
        for layer, other in zip(alone.kept_tokens[0], mine.kept_tokens[0], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(layer, other, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_bytes_are_as_planned(parts: tuple[Any, Any], pipe: Any, guidance: float) -> None:
    arguments = {"kv_compression": "headkv", "kv_budget": 9, "image_grid": LUMINA, "guidance_scale": guidance}
    held = pipe("a cat", **arguments).report.nbytes
    lengths = [73] if guidance == 1 else [73, 3]  # the prompt with all around it, and the image's header
    plans = [plan_memory(parts[0], "headkv", budget=9, condition=n, image_grid=LUMINA) for n in lengths]
    assert sum(plan.nbytes for plan in plans) == sum(2 * 2 * (n + 9 + 5) * 8 * 2 * 4 for n in lengths)
    assert sum(plan.nbytes for plan in plans) < held <= sum(plan.nbytes + plan.bookkeeping for plan in plans)


def test_pictures_come_from_the_codes(pipe: Any, parts: tuple[Any, Any]) -> None:
    out = pipe("a cat", seed=0, image_grid=LUMINA)
    picture = out.images[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (8, 16)
    rows = out.tokens.view(8, 5)[:, :4]
    mapping = parts[0].model.vocabulary_mapping.bpe2img  # transformers' own reading of the vocabulary
    for row in range(8):
        for column in range(4):
            level = mapping[int(rows[row, column])] * 10
            assert picture.getpixel((2 * column, 2 * row)) == (level,) * 3


@pytest.fixture(scope="module")
def vq_model() -> Any:
    from diffusers import VQModel

    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        num_vq_embeddings=CODES,
        vq_embed_dim=4,
        norm_num_groups=8,
        lookup_from_codebook=True,
    ).eval()


def test_a_diffusers_decoder_as_object_and_as_folder(
    parts: tuple[Any, Any], pipe: Any, vq_model: Any, tmp_path: Path
) -> None:
    codes = torch.arange(CODES).view(1, 4, 6)
    with torch.no_grad():
        expected = vq_model.decode(codes.flatten(), force_not_quantize=True, shape=(1, 4, 6, 4)).sample
        assert torch.equal(image_decoder(vq_model, CODES)(codes), expected)
    vq_model.save_pretrained(tmp_path)
    drawn = []
    for decoder in (vq_model, tmp_path, str(tmp_path)):
        ours = headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1], image_decoder=decoder)
        out = ours("a cat", seed=1)
        assert out.images[0].size == (12, 12)
        assert torch.equal(out.tokens, pipe("a cat", seed=1).tokens)
        drawn.append(out.images[0].tobytes())
    assert len(set(drawn)) == 1


def test_what_decodes_no_image(parts: tuple[Any, Any], vq_model: Any, tmp_path: Path) -> None:
    def make(decoder: Any) -> Any:
        return headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1], image_decoder=decoder)

    with pytest.raises(ValueError, match="no decoder: pass image_decoder="):
        make(None)
    with pytest.raises(TypeError, match="image_decoder must be a diffusers VQModel"):
        make(3)
    with pytest.raises(ValueError, match="no diffusers VQModel that can be read"):
        make(tmp_path)
    with pytest.raises(ValueError, match="knows 24 codes and the model draws 25"):
        image_decoder(vq_model, 25)
    with pytest.raises(ValueError, match=r"must give a tensor \[B, H, W, 3\]"):
        make(lambda codes: codes)("a cat")
    with pytest.raises(ValueError, match=r"must give uint8, or floats"):
        make(lambda codes: grey(codes).long())("a cat")


def test_from_a_folder(parts: tuple[Any, Any], pipe: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    carried = {**load_file(weights), "model.vqmodel.decoder.conv_in.weight": torch.ones(3)}  # as some published ones
    save_file(carried, weights, metadata={"format": "pt"})
    loaded = headkv_mm.pipeline("text-to-image", model=tmp_path, image_decoder=grey)
    mine, theirs = loaded("a cat", seed=1), pipe("a cat", seed=1)
    assert torch.equal(mine.tokens, theirs.tokens)
    assert mine.images[0].tobytes() == theirs.images[0].tobytes()
    save_file({**carried, "model.elephant": torch.ones(3)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 belong to another model"):
        headkv_mm.pipeline("text-to-image", model=tmp_path, image_decoder=grey)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    save_file(carried, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="pass processor="):
        headkv_mm.pipeline("text-to-image", model=tmp_path, image_decoder=grey)


def test_what_cannot_be_drawn(parts: tuple[Any, Any], pipe: Any) -> None:
    with pytest.raises(ValueError, match="contains an image token"):
        pipe("a cat <image>")
    with pytest.raises(ValueError, match="are longer than the 256 positions of this Chameleon model"):
        pipe("a" * 300)
    with pytest.raises(ValueError, match=r"ask for ImageGrid\(4, 6, row_stride=7\)"):
        pipe("a cat", image_grid=ImageGrid(4, 6))
    with pytest.raises(ValueError, match="no word for 5x6"):
        pipe("a cat", image_grid=ImageGrid(5, 6, row_stride=7))
    with pytest.raises(ValueError, match="no word for 18x6"):
        pipe("a cat", image_grid=ImageGrid(18, 6, row_stride=7))
    names = parts[0].config.vocabulary_map
    parts[0].config.vocabulary_map = {name: index for name, index in names.items() if not name.startswith("IMGIMG")}
    try:
        with pytest.raises(ValueError, match="names no image tokens"):
            headkv_mm.pipeline("text-to-image", model=parts[0], processor=parts[1], image_decoder=grey)
    finally:
        parts[0].config.vocabulary_map = names


def test_defaults_are_the_authors(pipe: Any) -> None:
    anole, lumina = (pipe("a", image_grid=grid).report.settings for grid in (None, LUMINA))
    assert anole == {"guidance_scale": 3.0, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    assert lumina == {"guidance_scale": 4.0, "do_sample": True, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}
    ours = headkv_mm.pipeline(
        "text-to-image", pipe.model, processor=pipe.processor, image_decoder=grey, image_grid=LUMINA
    )
    assert ours.settings()["sampling"] == lumina
    assert ours.settings()["image_grid"] == [8, 4, 5]
    assert pipe("a", image_grid=LUMINA, top_k=3, guidance_scale=2).report.settings["top_k"] == 3


def test_threads_do_not_meet(pipe: Any) -> None:
    asked = [("headkv", 0.25), ("lines", 0.5), ("none", None)]
    alone = [pipe("a cat", seed=2, kv_compression=name, kv_budget=budget).tokens for name, budget in asked]
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        name, budget = asked[index]
        found[index] = pipe("a cat", seed=2, kv_compression=name, kv_budget=budget).tokens

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], tokens) for index, tokens in enumerate(alone))


def test_from_the_command_line(parts: tuple[Any, Any], vq_model: Any, tmp_path: Path, capsys: Any) -> None:
    from headkv_mm.cli import main

    parts[0].save_pretrained(tmp_path / "model")
    parts[1].save_pretrained(tmp_path / "model")
    vq_model.save_pretrained(tmp_path / "decoder")
    words = ["generate", "a cat", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--grid"]
    decoder = ["--image-decoder", str(tmp_path / "decoder"), "--scale", "1", "--no-progress"]
    assert main([*words, "8x4x5", "--kv-budget", "1/4", *decoder]) == 0
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(8, 16)]
    assert main([*words, "8x4", *decoder]) == 2
    assert "--grid 8x4x5" in capsys.readouterr().err
    assert main([*words, "8x4x5"]) == 2
    assert "no decoder: pass image_decoder=" in capsys.readouterr().err
