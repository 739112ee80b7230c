# SPDX-License-Identifier: Apache-2.0
"""A tiny language model that stands for an image model, and the oracle that proves eviction right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from headkv_mm import HeadKVCache, ImageGrid

GRID = ImageGrid(8, 8)
PADS = (7, 3, 0)


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        # Wide weights make attention sharp, so that a wrong entry shows.
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def grid() -> ImageGrid:
    return GRID


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Three prompts of 13, 17 and 20 tokens, left padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 120, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(PADS):
        mask[row, :pads] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@dataclass
class Run:
    """Tokens and logits of a run, and what each step attended to: [step][layer][row][head] positions."""

    tokens: Tensor
    logits: Tensor
    attended: list[list[list[list[Tensor]]]]


@pytest.fixture
def decode(model: LlamaForCausalLM) -> Callable[..., Run]:
    """Greedy decoding step by step with any cache; forced tokens if given."""

    def run(inputs: dict[str, Tensor], cache: object, steps: int, forced: Tensor | None = None) -> Run:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, tokens, attended = [], [], []
        for step in range(steps):
            with torch.no_grad():
                output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits.append(output.logits[:, -1])
            ids = output.logits[:, -1:].argmax(-1) if forced is None else forced[:, step : step + 1]
            tokens.append(ids)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            if isinstance(cache, HeadKVCache):
                kept = [cache.kept_positions(layer) for layer in range(len(cache))]
                new = positions[:, 0].tolist()
                attended.append(
                    [
                        [
                            [torch.cat([head, torch.tensor([new[row]])]) for head in heads]
                            for row, heads in enumerate(rows)
                        ]
                        for rows in kept
                    ]
                )
        return Run(torch.cat(tokens, 1), torch.stack(logits, 1), attended)

    return run


@pytest.fixture
def oracle(model: LlamaForCausalLM, decode: Callable[..., Run]) -> Iterator[Callable[..., Tensor]]:
    """Logits of a full cache in which every row and head may see only the given positions, step by step."""
    state: dict[str, object] = {}

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        batch, heads, tokens, _ = query.shape
        group, columns = heads // key.shape[1], key.shape[2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, 1, tokens, columns, dtype=torch.bool).tril(columns - tokens)
        allowed = attention_mask.expand(batch, heads, tokens, columns).clone()
        if tokens == 1:
            run, pads = state["run"], state["pads"]
            sets = run.attended[columns - state["prompt"] - 1][module.layer_idx]
            for row in range(batch):
                for head in range(key.shape[1]):
                    kept = torch.zeros(columns, dtype=torch.bool)
                    kept[sets[row][head] + pads[row]] = True
                    allowed[row, head * group : (head + 1) * group] &= kept
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
        weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    before = model.config._attn_implementation

    def run(inputs: dict[str, Tensor], compressed: Run) -> Tensor:
        state.update(
            run=compressed,
            prompt=inputs["input_ids"].shape[1],
            pads=(inputs["attention_mask"] == 0).sum(-1).tolist(),
        )
        model.set_attn_implementation("oracle")
        try:
            steps = compressed.tokens.shape[1]
            return decode(inputs, DynamicCache(config=model.config), steps, forced=compressed.tokens).logits
        finally:
            model.set_attn_implementation(before)

    return run
