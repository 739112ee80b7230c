# SPDX-License-Identifier: Apache-2.0
"""The LlamaGen model: positions, padding, loss, pixels, saving and loading, real sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoTokenizer, LlamaConfig

from headkv_mm.demo.tokenizer import build_tokenizer
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration, register
from headkv_mm.llamagen.positions import AxialRotaryEmbedding, LearnedPositions

CODES, PROMPT, HEIGHT, WIDTH = 20, 6, 4, 3
STEPS = HEIGHT * WIDTH
TeacherForced = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def test_unpadded_prompts_with_explicit_positions_match(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    tokens = torch.randint(CODES, (1, STEPS))
    padded = teacher_forced(prompts[:1], mask[:1], tokens)
    ids = torch.cat((prompts[:1, 2:], tokens[:, :-1]), dim=1)
    positions = torch.arange(2, PROMPT + STEPS - 1)[None]
    with torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=False, logits_to_keep=STEPS).logits
    torch.testing.assert_close(logits, padded, rtol=1e-4, atol=1e-4)


def test_labels_give_the_mean_cross_entropy(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor, teacher_forced: TeacherForced
) -> None:
    tokens = torch.randint(CODES, (3, STEPS))
    ids = torch.cat((prompts, tokens), dim=1)
    full = torch.cat((mask, torch.ones_like(tokens)), dim=1)
    labels = torch.cat((torch.full_like(prompts, -100), tokens), dim=1)
    with torch.no_grad():
        loss = model(ids, attention_mask=full, labels=labels, use_cache=False).loss
    logits = teacher_forced(prompts, mask, tokens)
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="labels must be image codes"):
        model(ids, attention_mask=full, labels=ids)
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, attention_mask=full, labels=labels, logits_to_keep=1)


def test_rotary_angles_by_row_and_column(make_config: Callable[..., LlamaGenConfig]) -> None:
    rotary = AxialRotaryEmbedding(make_config())
    positions = torch.tensor([[0, 2, PROMPT - 1, PROMPT, PROMPT + 1, PROMPT + WIDTH]])
    cosines, sines = rotary(torch.empty(0), positions)
    assert cosines.shape == (1, 6, 8)
    angles = torch.atan2(sines, cosines)[0, :, [0, 2]]  # frequency 1 of the row, of the column
    expected = torch.tensor([[0, 0], [2, 2], [5, 5], [6, 6], [6, 7], [7, 6]], dtype=torch.float32)
    torch.testing.assert_close(angles, torch.atan2(expected.sin(), expected.cos()))
    assert not list(rotary.buffers())


def test_learned_positions_name_the_next_cell(make_config: Callable[..., LlamaGenConfig]) -> None:
    positions = LearnedPositions(make_config())
    last = PROMPT + STEPS - 1
    embedded = positions(torch.tensor([[1, PROMPT - 1, PROMPT + WIDTH - 1, last]]))[0]
    rows, columns, slots = positions.rows.weight, positions.columns.weight, positions.slots.weight
    torch.testing.assert_close(embedded[0], slots[1])
    torch.testing.assert_close(embedded[1], slots[PROMPT - 1] + rows[0] + columns[0])
    torch.testing.assert_close(embedded[2], rows[1] + columns[0])
    torch.testing.assert_close(embedded[3], rows[HEIGHT] + columns[0])


def test_the_backbone_uses_the_attention_interface(
    model: LlamaGenForConditionalGeneration, prompts: torch.Tensor, mask: torch.Tensor
) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[int] = []

    def counting(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        seen.append(int(module.layer_idx))  # type: ignore[arg-type]
        return sdpa_attention_forward(module, *arguments, **keywords)

    AttentionInterface.register("sdpa_counting_test", counting)
    expected = model(prompts, attention_mask=mask[:, :PROMPT] * 0 + 1).logits
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa_counting_test")
    try:
        logits = model(prompts).logits
    finally:
        model.set_attn_implementation(before)
    assert seen == [0, 1]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_height": 0}, "image_height must be at least 1"),
        ({"patch_size": 0}, "patch_size"),
        ({"codebook_size": 30}, "must exceed codebook_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"text_config": {"model_type": "gpt2", "n_head": 4}}, "must be a LlamaConfig"),
        ({"text_config": {"head_dim": 6}}, "multiple of 4"),
        ({"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}, "'default'"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str, make_config: Callable[..., LlamaGenConfig]) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_pixels(model: LlamaGenForConditionalGeneration, make_config: Callable[..., LlamaGenConfig]) -> None:
    tokens = torch.arange(STEPS)[None].repeat(2, 1)
    pixels = model.decode_image_tokens(tokens)
    assert pixels.shape == (2, HEIGHT * 2, WIDTH * 2, 3)
    assert pixels.dtype == torch.uint8
    assert model.patch_decoder is not None
    assert torch.equal(pixels[1, 2:4, 4:6], model.patch_decoder.codebook[1 * WIDTH + 2])
    with pytest.raises(ValueError, match="shape"):
        model.decode_image_tokens(tokens[:, 1:])
    with pytest.raises(ValueError, match=r"must be in 0\.\.19"):
        model.decode_image_tokens(tokens + CODES)
    with pytest.raises(ValueError, match="no pixel codebook"):
        LlamaGenForConditionalGeneration(make_config(patch_size=None)).decode_image_tokens(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_through_the_auto_classes(
    model: LlamaGenForConditionalGeneration,
    tmp_path: Path,
    dtype: torch.dtype,
    prompts: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    register()
    register()
    model.save_pretrained(tmp_path)
    build_tokenizer(CODES).save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert type(loaded) is LlamaGenForConditionalGeneration
    assert isinstance(loaded.config.get_text_config(), LlamaConfig)
    assert loaded.dtype == dtype
    assert loaded.patch_decoder.codebook.dtype == torch.uint8  # type: ignore[union-attr]
    assert torch.equal(loaded.patch_decoder.codebook, model.patch_decoder.codebook)  # type: ignore[union-attr]
    if dtype == torch.float32:
        expected = model.generate(prompts, mask, do_sample=False)
        assert torch.equal(loaded.generate(prompts, mask, do_sample=False), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left"
    text = "red ring top on white"
    assert tokenizer(text)["input_ids"] == build_tokenizer(CODES)(text)["input_ids"]
    assert AutoConfig.from_pretrained(tmp_path).num_image_tokens == STEPS


def test_from_config_initialises_everything(make_config: Callable[..., LlamaGenConfig]) -> None:
    made = AutoModelForMultimodalLM.from_config(make_config())
    assert 0.015 < made.lm_head.weight.std().item() < 0.025
    assert 0.015 < made.model.positions.rows.weight.std().item() < 0.025
    assert made.patch_decoder.codebook.max().item() == 0


def llamagen_xl(**text: Any) -> LlamaGenConfig:
    sizes = {
        "model_type": "llama",
        "vocab_size": 16384 + 1000,
        "hidden_size": 1280,
        "intermediate_size": 3584,
        "num_hidden_layers": 36,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
    }
    return LlamaGenConfig(text_config={**sizes, **text})


def test_llamagen_xl_sizes_build() -> None:
    with torch.device("meta"):
        model = LlamaGenForConditionalGeneration(llamagen_xl())
        mask = torch.zeros(2, 1, 120, 120)  # ready-made: checking a mask needs values, and these tensors have none
        logits = model(torch.zeros(2, 120, dtype=torch.long), attention_mask=mask, use_cache=False).logits
    assert logits.shape == (2, 120, 16384)
    blocks = sum(item.numel() for item in model.model.language_model.layers.parameters())
    assert blocks == 36 * (4 * 1280**2 + 3 * 1280 * 3584 + 2 * 1280)
    assert model.model.positions is None
    assert model.config.num_image_tokens == 576


def test_a_narrow_llamagen_with_the_real_grid_runs() -> None:
    config = llamagen_xl(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaGenForConditionalGeneration(config).eval()
    prompts = torch.randint(16384, 17000, (1, 120))
    tokens = model.generate(prompts, do_sample=True, seeds=[0])
    assert tokens.shape == (1, 576)
    with pytest.raises(ValueError, match="guidance needs negative_prompt_ids"):
        model.generate(prompts, guidance_scale=2.0)
