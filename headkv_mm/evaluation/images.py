# SPDX-License-Identifier: Apache-2.0
"""Generates the unseen captions with one compression, and scores what was drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.demo.parsing import SceneScore, score
from headkv_mm.demo.scenes import Scene, caption, unseen_scenes
from headkv_mm.evaluation.prompts import Prompts, encode
from headkv_mm.evaluation.settings import EvaluationSettings

OUTCOMES = ("all_right", "background", "place", "shape", "colour", "same_colour", "margin_clean")
COUNTS = ("extra", "missing", "unreadable")
BYTES = ("nbytes", "nbytes_peak", "nbytes_full", "kv_nbytes", "bookkeeping_nbytes")


@dataclass(frozen=True)
class Batch:
    """Captions whose images are generated together.

    Attributes:
        scenes: what is asked for.
        prompts: the captions as tokens.
        seeds: one per image.
    """

    scenes: list[Scene]
    prompts: Prompts
    seeds: list[int]


def batches(model: Any, settings: EvaluationSettings) -> Iterator[Batch]:
    """The captions of an evaluation, batch by batch."""
    scenes = unseen_scenes(settings.captions, settings.seed)
    for first in range(0, len(scenes), settings.batch_size):
        part = scenes[first : first + settings.batch_size]
        seeds = [settings.image_seed(first + index) for index in range(len(part))]
        yield Batch(part, encode(model, [caption(scene) for scene in part]), seeds)


@dataclass(frozen=True)
class Generated:
    """What one batch gave.

    Attributes:
        tokens: int64 [B, N] on the CPU.
        scores: one per image.
        nbytes: bytes of the batch's cache by `BYTES`.
        local: share of local heads, None for methods without head types.
        seconds: wall-clock time of generation; pictures and their scores not included.
    """

    tokens: Tensor
    scores: list[SceneScore]
    nbytes: dict[str, int]
    local: float | None
    seconds: float


def generate(
    model: Any, batch: Batch, compression: Compression, on_token: Callable[[int], object] = lambda count: None
) -> Generated:
    """Generate with the model's own sampling settings, and read the pictures back."""
    cache = HeadKVCache(model, compression)
    began = time.perf_counter()
    tokens = model.generate(
        batch.prompts.ids,
        batch.prompts.mask,
        seeds=batch.seeds,
        past_key_values=cache,
        callback=lambda done, total: on_token(1),
    )
    tokens = tokens.cpu()  # waits for the device
    seconds = time.perf_counter() - began
    pictures = model.decode_image_tokens(tokens).cpu().numpy()
    scores = [score(scene, picture) for scene, picture in zip(batch.scenes, pictures, strict=True)]
    local = [layer.allocation.local for layer in cache.compressed_layers if layer.allocation is not None]
    labels = [label for label in local if label is not None]
    share = float(torch.stack(labels).double().mean()) if labels else None
    return Generated(tokens, scores, cache_bytes(cache), share, seconds)


def cache_bytes(cache: HeadKVCache) -> dict[str, int]:
    """Bytes at the end of generation, at most, of a full cache; and what is keys and values, and what is not.

    Keys and values count with all the room that their store has, filled or not.
    """
    stored = 0
    for layer in cache.compressed_layers:
        holder = layer if layer.store is None else layer.store
        stored += sum(tensor.nbytes for tensor in (holder.keys, holder.values) if tensor is not None)
    return {
        "nbytes": cache.nbytes,
        "nbytes_peak": cache.nbytes_peak,
        "nbytes_full": cache.nbytes_full,
        "kv_nbytes": stored,
        "bookkeeping_nbytes": cache.nbytes - stored,
    }


def outcome_columns(scores: list[SceneScore]) -> dict[str, list[int]]:
    """Scores by name, one number per caption."""
    return {name: [int(getattr(item, name)) for item in scores] for name in (*OUTCOMES, *COUNTS)}


def says_same(scene: Scene) -> bool:
    """Whether the caption leaves a colour to the image ("same")."""
    return any(item.same_colour for item in scene.objects)
