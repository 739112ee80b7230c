# SPDX-License-Identifier: Apache-2.0
"""Workload: memory of weights, activations and cache for so many images or texts, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .budgets import Budget
from .compression import Compression
from .image_grid import ImageGrid
from .memory import MemoryPlan, plan_memory
from .weight_bytes import weight_bytes


@dataclass(frozen=True)
class Workload:
    """What is generated, and with what.

    Attributes:
        config: the model's configuration.
        weights: bytes of the weights.
        guided: classifier-free guidance: two rows per image.
        condition: prompt tokens of an image, padding included.
        image_grid: where the image lies; None for a text.
        tokens: tokens of a text, prompt and answer together.
        chunk: tokens that go through the model at once while the prompt is read.
        dtype: of cache and activations.
    """

    config: Any
    weights: int
    guided: bool
    condition: int
    image_grid: ImageGrid | None
    tokens: int | None
    chunk: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model_or_config: Any,
        *,
        guided: bool = False,
        condition: int = 0,
        image_grid: ImageGrid | None = None,
        tokens: int | None = None,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
        weights: int | None = None,
    ) -> Workload:
        """Fill in what the model says itself.

        Args:
            model_or_config: the model, or its configuration: then nothing is allocated.
            guided, condition, tokens: see the class.
            image_grid: by default what the configuration states.
            chunk: by default the whole prompt, and of a text everything.
            dtype: the model's by default.
            weights: bytes of the weights; counted by default.

        Raises:
            ValueError: if neither a grid nor `tokens` is known, or the weights cannot be counted.
        """
        config = getattr(model_or_config, "config", model_or_config)
        text = config.get_text_config(decoder=True)
        grid = image_grid or (ImageGrid.from_config(config) if tokens is None else None)
        if grid is None and tokens is None:
            raise ValueError(
                f"{type(config).__name__} states no image grid; pass image_grid=ImageGrid(height, width) for images, "
                "or tokens=N for texts"
            )
        dtype = dtype or getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
        if weights is None:
            weights = weight_bytes(model_or_config, dtype)
        whole = condition if grid is not None else (tokens or 0)
        return cls(config, weights, guided, condition, grid, tokens, max(chunk or whole, 1), dtype)

    def rows(self, batch: int) -> int:
        """Rows of the cache for so many images or texts."""
        return 2 * batch if self.guided else batch

    def cache(self, compression: Any, budget: Budget | None, batch: int) -> MemoryPlan:
        """Bytes of keys and values, see `plan_memory`."""
        if self.image_grid is None:
            return plan_memory(
                self.config,
                compression,
                budget=budget,
                rows=self.rows(batch),
                tokens=self.tokens,
                dtype=self.dtype,
            )
        return plan_memory(
            self.config,
            compression,
            budget=budget,
            rows=self.rows(batch),
            condition=self.condition,
            image_grid=self.image_grid,
            dtype=self.dtype,
        )

    def activations(self, batch: int, plan: MemoryPlan) -> int:
        """Estimate of what a forward needs beside weights and cache.

        The widest point of one block, its attention or its feed-forward part, for a prompt chunk; scores over the
        vocabulary in the cache's dtype and twice in float32; and one layer's keys and values once more: the dense
        prompt that a layer chooses from, a layer that is copied into other regions, or the tensor that a growing stock
        cache copies into. Attention scores of a prompt are not counted: fused attention does not hold them. Nor is the
        picture decoder.

        Args:
            batch: images or texts.
            plan: of the cache for that batch.
        """
        text = self.config.get_text_config(decoder=True)
        rows, item = self.rows(batch), self.dtype.itemsize
        hidden, inner = text.hidden_size, getattr(text, "intermediate_size", 4 * text.hidden_size)
        heads = text.num_attention_heads
        dim = getattr(text, "head_dim", None) or hidden // heads
        attention = 2 * hidden + 6 * heads * dim  # residual, normed; q, k, v, two rotated, output
        forward = 2 * hidden + 3 * inner  # residual, normed; gate, up, product
        block = rows * self.chunk * (max(attention, forward) * item + hidden * 4)
        scores = rows * text.vocab_size * (item + 2 * 4)
        read = self.condition if self.image_grid is not None else (self.tokens or 0)
        written = self.image_grid.tokens + self.image_grid.start if self.image_grid is not None else 0
        dense = plan.nbytes_full * read // max(read + written, 1)
        return int(block + scores + max(dense, plan.nbytes_peak) // text.num_hidden_layers)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a batch takes.

    Attributes:
        batch: images or texts.
        weights, activations: see `Workload`; activations are an estimate.
        cache: the most that the cache ever holds, bookkeeping included.
        cache_end: what it holds at the end.
        cache_full: bytes of a stock cache at the end.
    """

    batch: int
    weights: int
    activations: int
    cache: int
    cache_end: int
    cache_full: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.activations + self.cache


def memory_needed(
    workload: Workload, compression: Any = "headkv", *, batch: int, budget: Budget | None = None
) -> MemoryNeed:
    """Bytes that a batch takes with a compression.

    Raises:
        ValueError: for an unknown method, or a budget that is too small.
    """
    parsed = Compression.parse(compression, budget=budget)
    plan = workload.cache(parsed, None, batch)
    return MemoryNeed(
        batch=batch,
        weights=workload.weights,
        activations=workload.activations(batch, plan),
        cache=plan.nbytes_peak,
        cache_end=plan.nbytes + plan.bookkeeping,
        cache_full=plan.nbytes_full,
    )
