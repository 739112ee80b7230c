# SPDX-License-Identifier: Apache-2.0
"""Making the KV cache of a run and reading what it held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.pipelines.outputs import GenerationReport

FULL = "none"


def new_cache(model: PreTrainedModel, compression: Compression, grid: ImageGrid) -> Any:
    """An empty cache for one generation: transformers' own without compression, else a `HeadKVCache`."""
    if compression.method == FULL:
        from transformers import DynamicCache

        return DynamicCache(config=model.config.get_text_config(decoder=True))
    from headkv_mm.cache import HeadKVCache

    return HeadKVCache(model, compression, image_grid=grid)


def run_report(
    caches: Sequence[Any],
    compression: Compression,
    *,
    images: int,
    tokens: int,
    seconds: float,
    settings: dict[str, Any],
) -> GenerationReport:
    """The report of one run.

    Args:
        caches: the caches of the run, still full.
        compression: what they were made with.
        images: number of images.
        tokens: image tokens, all images together.
        seconds: wall-clock time.
        settings: sampling settings.
    """
    from headkv_mm.pipelines.outputs import GenerationReport

    if compression.method == FULL:
        held = sum(_stock_bytes(cache) for cache in caches)
        held_peak = held_full = held
        reports = ()
    else:
        reports = tuple(cache.report() for cache in caches)
        held = sum(report.nbytes for report in reports)
        held_peak = sum(report.nbytes_peak for report in reports)
        held_full = sum(report.nbytes_full for report in reports)
    return GenerationReport(
        method=compression.method,
        budget=None if compression.method == FULL else compression.budget,
        options=dict(compression.kwargs),
        nbytes=held,
        nbytes_peak=held_peak,
        nbytes_full=held_full,
        images=images,
        runs=1,
        tokens=tokens,
        seconds=seconds,
        settings=settings,
        caches=reports,
    )


def kept_image_tokens(
    cache: Any, compression: Compression, condition_lengths: torch.Tensor, image_tokens: int, layers: int, heads: int
) -> list[list[list[torch.Tensor]]]:
    """The image tokens that each head still holds.

    Args:
        cache: a cache of a finished run; row b belongs to image b.
        compression: what it was made with.
        condition_lengths: int64 [B], positions before the image.
        image_tokens: tokens of an image.
        layers: number of layers.
        heads: number of KV heads.

    Returns:
        For every image, layer and KV head an int64 tensor of raster indices, ascending. The last token of an image is
        never stored, because nothing is generated after it.
    """
    if compression.method == FULL:
        everything = torch.arange(image_tokens - 1)
        return [[[everything] * heads for _ in range(layers)] for _ in condition_lengths]
    kept: list[list[list[torch.Tensor]]] = [[] for _ in condition_lengths]
    for layer in range(layers):
        positions = cache.kept_positions(layer)  # [row][head] -> positions
        for image, condition in enumerate(condition_lengths.tolist()):
            kept[image].append([(row[row >= condition] - condition).cpu() for row in positions[image]])
    return kept


def _stock_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache."""
    return sum(
        int(tensor.nbytes)
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, torch.Tensor)
    )
