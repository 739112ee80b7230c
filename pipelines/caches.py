# SPDX-License-Identifier: Apache-2.0
"""Reading what the KV caches of a run held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.cache import HeadKVCache
from headkv_mm.pipelines.outputs import GenerationReport

if TYPE_CHECKING:
    from headkv_mm.memory import CacheReport

FULL = "none"


def run_report(
    caches: Sequence[Any],
    *,
    images: int,
    tokens: int,
    seconds: float,
    settings: dict[str, Any],
    weights: int = 0,
) -> GenerationReport:
    """The report of one run.

    Args:
        caches: the caches of the run, still full; ours or transformers' own.
        images: number of images.
        tokens: image tokens, all images together.
        seconds: wall-clock time.
        settings: sampling settings.
        weights: bytes of the model's weights.
    """
    reports: tuple[CacheReport, ...] = tuple(cache.report() for cache in caches if isinstance(cache, HeadKVCache))
    stock = sum(stock_bytes(cache) for cache in caches if not isinstance(cache, HeadKVCache))
    first = reports[0] if reports else None
    return GenerationReport(
        method=FULL if first is None else first.method,
        budget=None if first is None else first.budget,
        options={} if first is None else dict(first.options),
        nbytes=stock + sum(report.nbytes for report in reports),
        nbytes_peak=stock + sum(report.nbytes_peak for report in reports),
        nbytes_full=stock + sum(report.nbytes_full for report in reports),
        images=images,
        runs=1,
        tokens=tokens,
        seconds=seconds,
        settings=settings,
        caches=reports,
        nbytes_weights=weights,
    )


def kept_image_tokens(
    cache: Any, condition_lengths: torch.Tensor, image_tokens: int, layers: int, heads: int
) -> list[list[list[torch.Tensor]]]:
    """The image tokens that each head still holds.

    Args:
        cache: a cache of a finished run; row b belongs to image b.
        condition_lengths: int64 [B], positions before the image.
        image_tokens: tokens of an image.
        layers: number of layers.
        heads: number of KV heads.

    Returns:
        For every image, layer and KV head an int64 tensor of raster indices, ascending. The last token of an image is
        never stored, because nothing is generated after it.
    """
    if not isinstance(cache, HeadKVCache):
        everything = torch.arange(image_tokens - 1)
        return [[[everything] * heads for _ in range(layers)] for _ in condition_lengths]
    kept: list[list[list[torch.Tensor]]] = [[] for _ in condition_lengths]
    for layer in range(layers):
        positions = cache.kept_positions(layer)  # [row][head] -> positions
        for image, condition in enumerate(condition_lengths.tolist()):
            kept[image].append([(row[row >= condition] - condition).cpu() for row in positions[image]])
    return kept


def stock_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache."""
    return sum(
        int(tensor.nbytes)
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor)
    )
