# SPDX-License-Identifier: Apache-2.0
"""Random LlamaGen checkpoints in the published layout, and what they compute, written from the formulas.

Nothing here uses the library: rotary pairs are neighbours, condition and image go through one pass without a cache,
and the decoder is spelled out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
CODES, WIDTH, HEADS, LAYERS, GRID = 24, 64, 4, 2, 6
CLASSES, CAPTION, FEATURES = 5, 8, 12
LATENT, CODE_SIZE, BASE, LEVELS = 32, 4, 32, (1, 2)


def transformer(kind: str, kv_heads: int = HEADS, seed: int = 0) -> Weights:
    """A transformer's weights; large enough that every input matters."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, std: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    head, hidden = WIDTH // HEADS, 96
    weights = {"tok_embeddings.weight": random(CODES, WIDTH, std=1.0)}
    if kind == "class":
        weights["cls_embedding.embedding_table.weight"] = random(CLASSES + 1, WIDTH, std=1.0)
    else:
        weights["cls_embedding.uncond_embedding"] = random(CAPTION, FEATURES, std=1.0)
        weights["cls_embedding.cap_proj.fc1.weight"] = random(WIDTH, FEATURES)
        weights["cls_embedding.cap_proj.fc2.weight"] = random(WIDTH, WIDTH)
    for index in range(LAYERS):
        layer = f"layers.{index}."
        weights[layer + "attention.wqkv.weight"] = random((HEADS + 2 * kv_heads) * head, WIDTH)
        weights[layer + "attention.wo.weight"] = random(WIDTH, WIDTH)
        weights[layer + "feed_forward.w1.weight"] = random(hidden, WIDTH)
        weights[layer + "feed_forward.w3.weight"] = random(hidden, WIDTH)
        weights[layer + "feed_forward.w2.weight"] = random(WIDTH, hidden)
        weights[layer + "attention_norm.weight"] = 1 + random(WIDTH, std=0.1)
        weights[layer + "ffn_norm.weight"] = 1 + random(WIDTH, std=0.1)
    weights["norm.weight"] = 1 + random(WIDTH, std=0.1)
    weights["output.weight"] = random(CODES, WIDTH)
    return weights


def class_condition(weights: Weights, labels: list[int]) -> Tensor:
    """Embeddings [B, 1, D]."""
    return weights["cls_embedding.embedding_table.weight"][labels][:, None]


def text_condition(weights: Weights, features: Tensor) -> Tensor:
    """Embeddings [B, P, D] of features [B, P, C]."""
    hidden = features @ weights["cls_embedding.cap_proj.fc1.weight"].T
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    return hidden @ weights["cls_embedding.cap_proj.fc2.weight"].T


def angles(prompt: int, theta: float = 10000.0) -> Tensor:
    """Cosines and sines [P + GRID * GRID, D / 2, 2] as published: zeros for the condition."""
    head = WIDTH // HEADS
    turned = torch.zeros(prompt + GRID * GRID, head // 2)
    for cell in range(GRID * GRID):
        for index in range(head // 4):
            frequency = theta ** (-2 * index / (head // 2))
            for place, axis in ((index, cell // GRID), (head // 4 + index, cell % GRID)):
                turned[prompt + cell, place] = axis * frequency
    table = torch.stack((turned.cos(), turned.sin()), dim=-1)
    table[:prompt] = 0
    return table


def logits(weights: Weights, condition: Tensor, codes: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scores [B, codes + 1, K] of the image codes, in one pass.

    Args:
        weights: of a transformer.
        condition: embeddings [B, P, D].
        codes: [B, n], the first codes of the image.
        valid: [B, P], 0 at the condition's padding.
    """
    batch, prompt, _ = condition.shape
    hidden = torch.cat((condition, weights["tok_embeddings.weight"][codes]), dim=1)
    columns, head = hidden.shape[1], WIDTH // HEADS
    seen = torch.ones(columns, columns, dtype=torch.bool).tril().repeat(batch, 1, 1)
    if valid is not None:
        seen[:, :, :prompt] &= valid[:, None].bool()
    seen |= torch.eye(columns, dtype=torch.bool)
    table = angles(prompt)[:columns]
    turn = torch.complex(table[..., 0], table[..., 1])[None, :, None]  # [1, T, 1, D / 2]

    def rotate(states: Tensor) -> Tensor:
        pairs = torch.view_as_complex(states.unflatten(-1, (head // 2, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    for index in range(LAYERS):
        layer = f"layers.{index}."
        projected = norm(hidden, weights[layer + "attention_norm.weight"]) @ weights[layer + "attention.wqkv.weight"].T
        groups = (projected.shape[-1] // head - HEADS) // 2
        heads = projected.unflatten(-1, (HEADS + 2 * groups, head))
        query, key, value = heads.split([HEADS, groups, groups], dim=2)
        query, key = rotate(query), rotate(key)
        key, value = (states.repeat_interleave(HEADS // groups, dim=2) for states in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / head**0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), value)
        hidden = hidden + mixed.flatten(2) @ weights[layer + "attention.wo.weight"].T
        inner = norm(hidden, weights[layer + "ffn_norm.weight"])
        gate, up = (inner @ weights[layer + f"feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        hidden = hidden + (gate * gate.sigmoid() * up) @ weights[layer + "feed_forward.w2.weight"].T
    return norm(hidden, weights["norm.weight"])[:, prompt - 1 :] @ weights["output.weight"].T


def norm(states: Tensor, weight: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def greedy(weights: Weights, condition: Tensor, null: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Codes [B, GRID * GRID] of the best choice under guidance."""
    codes = torch.zeros(len(condition), 0, dtype=torch.long)
    for _ in range(GRID * GRID):
        with_prompt = logits(weights, condition, codes, valid)[:, -1]
        without = logits(weights, null, codes, valid)[:, -1]
        best = (without + (with_prompt - without) * scale).argmax(-1)
        codes = torch.cat((codes, best[:, None]), dim=1)
    return codes


def tokenizer(codes: int = CODES, seed: int = 1) -> Weights:
    """A VQ tokenizer's weights."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def conv(name: str, into: int, out: int, kernel: int) -> None:
        weights[f"{name}.weight"] = (
            torch.randn(out, into, kernel, kernel, generator=generator) / (into * kernel**2) ** 0.5
        )
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def group_norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)

    def residual(name: str, into: int, out: int) -> None:
        group_norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", into, out, 3)
        group_norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attention(name: str, channels: int) -> None:
        group_norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name: str, channels: int) -> None:
        residual(f"{name}.0", channels, channels)
        attention(f"{name}.1", channels)
        residual(f"{name}.2", channels, channels)

    widest = BASE * LEVELS[-1]
    conv("encoder.conv_in", 3, BASE, 3)
    into = BASE
    for level, factor in enumerate(LEVELS):
        for block in range(2):
            residual(f"encoder.conv_blocks.{level}.res.{block}", into, BASE * factor)
            into = BASE * factor
            if level == len(LEVELS) - 1:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", into)
        if level < len(LEVELS) - 1:
            conv(f"encoder.conv_blocks.{level}.downsample.conv", into, into, 3)
    middle("encoder.mid", widest)
    group_norm("encoder.norm_out", widest)
    conv("encoder.conv_out", widest, LATENT, 3)
    conv("decoder.conv_in", LATENT, widest, 3)
    middle("decoder.mid", widest)
    for place, factor in enumerate(reversed(LEVELS)):
        for block in range(3):
            residual(f"decoder.conv_blocks.{place}.res.{block}", into, BASE * factor)
            into = BASE * factor
            if place == 0:
                attention(f"decoder.conv_blocks.{place}.attn.{block}", into)
        if place < len(LEVELS) - 1:
            conv(f"decoder.conv_blocks.{place}.upsample.conv", into, into, 3)
    group_norm("decoder.norm_out", BASE)
    conv("decoder.conv_out", BASE, 3, 3)
    conv("quant_conv", LATENT, CODE_SIZE, 1)
    conv("post_quant_conv", CODE_SIZE, LATENT, 1)
    weights["quantize.embedding.weight"] = torch.randn(codes, CODE_SIZE, generator=generator)
    weights["quantize.codebook_used"] = torch.zeros(64)
    return weights


def pictures(weights: Weights, codes: Tensor) -> Tensor:
    """Pixels [B, 3, h, w] of codes [B, GRID * GRID]; what lies in -1 to 1 is shown."""

    def conv(states: Tensor, name: str) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(states, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def group_norm(states: Tensor, name: str) -> Tensor:
        groups = states.reshape(len(states), 32, -1)
        spread = groups.var(-1, unbiased=False, keepdim=True)
        normal = ((groups - groups.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()).view(states.shape)
        return normal * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def swish(states: Tensor) -> Tensor:
        return states * states.sigmoid()

    def residual(states: Tensor, name: str) -> Tensor:
        inner = conv(swish(group_norm(states, f"{name}.norm1")), f"{name}.conv1")
        inner = conv(swish(group_norm(inner, f"{name}.norm2")), f"{name}.conv2")
        return inner + (conv(states, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in weights else states)

    def attention(states: Tensor, name: str) -> Tensor:
        normal = group_norm(states, f"{name}.norm")
        query, key, value = (conv(normal, f"{name}.{part}").flatten(2) for part in "qkv")  # [B, C, cells]
        scores = torch.einsum("bcq,bck->bqk", query, key) / query.shape[1] ** 0.5
        mixed = torch.einsum("bqk,bck->bcq", scores.softmax(-1), value).view(states.shape)
        return states + conv(mixed, f"{name}.proj_out")

    directions = weights["quantize.embedding.weight"]
    directions = directions / directions.norm(dim=-1, keepdim=True)
    states = directions[codes].transpose(1, 2).reshape(len(codes), -1, GRID, GRID)
    states = conv(conv(states, "post_quant_conv"), "decoder.conv_in")
    steps: list[Callable[[Tensor, str], Tensor]] = [residual, attention, residual]
    for index, step in enumerate(steps):
        states = step(states, f"decoder.mid.{index}")
    for place in range(len(LEVELS)):
        for block in range(3):
            states = residual(states, f"decoder.conv_blocks.{place}.res.{block}")
            if place == 0:
                states = attention(states, f"decoder.conv_blocks.{place}.attn.{block}")
        if place < len(LEVELS) - 1:
            larger = states.repeat_interleave(2, 2).repeat_interleave(2, 3)
            states = conv(larger, f"decoder.conv_blocks.{place}.upsample.conv")
    return conv(swish(group_norm(states, "decoder.norm_out")), "decoder.conv_out")
