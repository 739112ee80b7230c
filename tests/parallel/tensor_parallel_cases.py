# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and what each method generates with them: in one process, or as one rank of tensor parallelism."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import headkv_mm
from headkv_mm.allocators import MassCurves
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import HeadTable, save_head_table
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

LAYERS, HEADS = 2, 4
NEED_TABLES = ("none", "headkv-r2", "compresskv", "compilerkv")
HEAD_SCORES = [[0.1, 2.0, 0.3, 0.0, 0.9, 0.2, 0.1, 0.8], [0.01, 0.02, 0.0, 0.0, 0.01, 0.0, 0.0, 0.03]]
SCORES = [[1.0, 5.0, 2.0, 0.5], [3.0, 0.0, 4.0, 1.0]]
HEAD_WEIGHTS = [[1.0, 0.8, 1.5, 1.0], [1.2, 1.0, 0.8, 1.5]]
BACKBONE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": HEADS,
    # Wide weights make attention sharp, so that a wrong entry shows.
    "initializer_range": 0.3,
}
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"budget": 0.4}) for name in headkv_mm.methods("text") if name not in NEED_TABLES},
    "headkv, no redistribution": ("headkv", {"budget": 24, "redistribute": False, "tau": 0.7}),
    "headkv, some local": ("headkv", {"budget": 0.4, "tau": 0.7, "local_window": 8}),
    "adakv, model": ("adakv", {"budget": 0.4, "scope": "model"}),
    "keydiff, curves of the model": ("keydiff", {"budget": 0.3, "allocator": MassCurves(window=8, scope="model")}),
    "headkv-r2, scores": ("headkv-r2", {"budget": 0.4, "scores": SCORES}),
    "headkv-r2, table": ("headkv-r2", {"budget": 20, "table": "heads.json"}),
    "compresskv, scores": (
        "compresskv",
        {"budget": 24, "head_scores": HEAD_SCORES, "layer_errors": [3.0, 1.0], "least": 8},
    ),
    "compilerkv, tables": (
        "compilerkv",
        {"budget": 0.4, "head_weights": HEAD_WEIGHTS, "gate": [[[0.0, 0.8], [0.0, 1.0]]] * 2, "entropy_edges": [0.6]},
    ),
    "fastkv, few tokens": ("fastkv", {"budget": 0.4, "tsp_least": 0}),
    "bytes": ("snapkv", {"budget": "60KiB"}),
}
IMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"budget": 0.6}) for name in ("headkv", "adakv", "tova", "logit-spread", "pointed")},
    "adakv, model": ("adakv", {"budget": 0.6, "scope": "model"}),
}


def save_models(folder: Path) -> None:
    """Write the language model with a head table, and the image model."""
    torch.manual_seed(0)
    text = LlamaForCausalLM(
        LlamaConfig(**BACKBONE, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ).eval()
    text.save_pretrained(folder / "text")
    scores = tuple(tuple(score for score in layer for _ in range(2)) for layer in SCORES)
    table = HeadTable("r2", fingerprint(text), scores, HEADS, examples=1, answered=1)
    save_head_table(table, folder / "heads.json")
    config = LlamaGenConfig(
        text_config={**BACKBONE, "model_type": "llama", "vocab_size": 40, "bos_token_id": None, "eos_token_id": None},
        image_height=6,
        image_width=6,
        codebook_size=30,
        max_prompt_length=6,
        patch_size=2,
        pad_token_id=30,
        bos_token_id=31,
        boi_token_id=32,
        null_token_id=33,
    )
    LlamaGenForConditionalGeneration(config).eval().save_pretrained(folder / "image")


def load_models(folder: Path, **loading: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The language model and the image model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases want `tp_plan` in a configuration
        text = LlamaForCausalLM.from_pretrained(folder / "text", **loading).eval()
        image = LlamaGenForConditionalGeneration.from_pretrained(folder / "image", **loading).eval()
    text.generation_config.eos_token_id = None
    return text, image


def generate_all(folder: Path, text: PreTrainedModel, image: PreTrainedModel) -> dict[str, Any]:
    """Tokens, kept positions by layer, row and head of this process, and bytes, by case; all as JSON types."""
    ids = torch.randint(6, 120, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    found: dict[str, Any] = {}
    for name, (method, options) in TEXT.items():
        options = {key: str(folder / value) if key == "table" else value for key, value in options.items()}
        with headkv_mm.compress(text, method, interval=8, **options) as session:
            tokens = text.generate(ids * mask, attention_mask=mask, max_new_tokens=18, do_sample=False)
        found[f"text: {name}"] = _seen(tokens[:, 50:], session.caches[0])
    prompt = torch.tensor([[30, 30, 31, 35, 36, 32], [31, 37, 38, 39, 35, 32]])
    for name, (method, options) in IMAGE.items():
        cache = headkv_mm.HeadKVCache(image, method, **options)
        tokens = image.generate(prompt, guidance_scale=2.0, do_sample=False, past_key_values=cache)
        found[f"image: {name}"] = _seen(tokens, cache)
    return found


def _seen(tokens: torch.Tensor, cache: headkv_mm.HeadKVCache) -> dict[str, Any]:
    kept = [[[head.tolist() for head in row] for row in cache.kept_positions(layer)] for layer in range(LAYERS)]
    return {"tokens": tokens.tolist(), "kept": kept, "nbytes": cache.nbytes, "lengths": cache.report().lengths}
