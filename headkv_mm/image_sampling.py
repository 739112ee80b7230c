# SPDX-License-Identifier: Apache-2.0
"""Drawing one image code per image and step from random streams that belong to the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def uniform_streams(
    batch_size: int,
    steps: int,
    seeds: Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> torch.Tensor:
    """All random numbers of a generation, drawn up front and on the CPU.

    An image's numbers depend on its own seed or generator only, so it comes out the same alone and in any batch, and
    on every device.

    Args:
        batch_size: number of images B.
        steps: numbers per image.
        seeds: one integer per image.
        generator: one generator per image, or a single one that the images use in turn. Without seeds and generator
            a seed per image is drawn from torch's global stream.

    Returns:
        float64 [B, steps], uniform in [0, 1).

    Raises:
        ValueError: if both are given, or not one per image.
    """
    if seeds is not None and generator is not None:
        raise ValueError("pass either seeds or generator, not both")
    if isinstance(generator, torch.Generator):
        return torch.rand(batch_size, steps, dtype=torch.float64, generator=generator, device=generator.device).cpu()
    if generator is not None:
        streams = list(generator)
    else:
        if seeds is None:
            seeds = torch.randint(2**62, (batch_size,)).tolist()
        streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    if len(streams) != batch_size:
        raise ValueError(f"expected one seed or generator per image ({batch_size}), got {len(streams)}")
    rows = [torch.rand(steps, dtype=torch.float64, generator=item, device=item.device).cpu() for item in streams]
    return torch.stack(rows)


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample by the inverse of the cumulative distribution.

    Args:
        scores: logits [B, K]; -inf marks codes that must not be drawn.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B], code i with probability softmax(scores)[i].
    """
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)  # [B, K]
    # Scaling by the total keeps the target below the last step of the sum in spite of rounding; "right" skips codes
    # of probability zero.
    target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A target that rounds up to the total would fall off the end: take the last code that has any probability.
    last_possible = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return torch.minimum(codes, last_possible)


def warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """transformers' own warpers in its order: temperature, top-k, top-p.

    Raises:
        ValueError: for a value out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: use do_sample=False for the best code")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 means all codes), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    chain = LogitsProcessorList()
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chain.append(TopKLogitsWarper(top_k=int(top_k)))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p=float(top_p)))
    return chain


class TokenDrawer:
    """Draws one token per image and step. An image's tokens depend on its own seed and scores, not on the batch.

    Args:
        seeds: one per image.
        steps: tokens that will be drawn.
        images: number of images; needed where `seeds` is None.
        generator: in place of `seeds`, see `uniform_streams`.
        do_sample: False takes the best token.
        temperature, top_k, top_p: see `warpers`.
    """

    def __init__(
        self,
        seeds: Sequence[int] | None,
        steps: int,
        *,
        images: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        self._warpers = warpers(temperature, top_k, top_p)
        count = len(seeds or ()) if images is None else images
        self._uniform = uniform_streams(count, steps, seeds, generator) if do_sample else None  # [B, steps]

    def __call__(self, step: int, scores: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [B] of scores [B, K], after guidance; -inf marks what must not be drawn."""
        scores = scores.float()
        if self._uniform is None:
            return scores.argmax(dim=-1)
        return draw(self._warpers(scores.new_empty(len(scores), 0, dtype=torch.long), scores), self._uniform[:, step])
