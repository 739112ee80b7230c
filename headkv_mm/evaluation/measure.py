# SPDX-License-Identifier: Apache-2.0
"""One run: all captions with one compression, generated, scored, and compared with the full cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from headkv_mm.allocators import HeadType
from headkv_mm.budgets import image_plan
from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.evaluation import labels
from headkv_mm.evaluation.fidelity import compare, forced_scores
from headkv_mm.evaluation.full_cache import FullCache, OnToken
from headkv_mm.evaluation.images import BYTES, Batch, Generated, generate, outcome_columns
from headkv_mm.image_grid import ImageGrid


def generate_all(
    model: Any, parts: list[Batch], compression: Compression, on_token: OnToken
) -> tuple[dict[str, Any], Tensor]:
    """Generate every batch.

    Returns:
        The run's results without the comparison, as JSON types, and its images [captions, N].
    """
    made: list[Generated] = [generate(model, part, compression, on_token) for part in parts]
    captions = sum(len(part.scenes) for part in parts)
    columns = [outcome_columns(item.scores) for item in made]
    shares = [(item.local, len(item.scores)) for item in made if item.local is not None]
    result = {
        "bytes_per_image": {name: sum(item.nbytes[name] for item in made) / captions for name in BYTES},
        "local_share": sum(share * count for share, count in shares) / captions if shares else None,
        "outcomes": {name: [value for column in columns for value in column[name]] for name in columns[0]},
        "seconds": {"generate": sum(item.seconds for item in made)},
    }
    return result, torch.cat([item.tokens for item in made])


def compare_all(
    model: Any, parts: list[Batch], compression: Compression, full: FullCache, *, start: int, on_token: OnToken
) -> tuple[dict[str, list[float]], float]:
    """Compare with the full cache under teacher forcing on the full cache's images.

    Args:
        model: the model.
        parts: batches.
        compression: what is compared.
        full: the full cache.
        start: index of the first token that an eviction can change, see `first_affected_token`.
        on_token: progress.

    Returns:
        Per caption, the means over the tokens from `start` on ("agreement", "kl") and over all ("agreement_all",
        "kl_all"); and seconds, those of the full cache not counted.
    """
    wanted = full.scores(on_token)
    columns: dict[str, list[float]] = {"agreement": [], "kl": [], "agreement_all": [], "kl_all": []}
    began = time.perf_counter()
    for part, tokens, scores in zip(parts, full.tokens, wanted, strict=True):
        cache = HeadKVCache(model, compression)
        fidelity = compare(scores, forced_scores(model, part.prompts, tokens, cache, on_token))
        for name, values in (("agreement", fidelity.agreement.double()), ("kl", fidelity.kl)):
            columns[name] += values[:, start:].mean(1).tolist()
            columns[f"{name}_all"] += values.mean(1).tolist()
    return columns, time.perf_counter() - began


def label_stability(compression: Compression, full: FullCache, grid: ImageGrid) -> list[dict[str, float]] | None:
    """How the method's head labels compare with those that the last row would have given, for several tau.

    Both are taken on the full cache's attention with the method's window and queries, see `labels.tokens_needed`.

    Returns:
        A line per tau, the method's own among them; None for a method without head types.
    """
    pieces = compression.pieces("image")
    if pieces is None or not isinstance(pieces.allocator, HeadType):
        return None
    allocator, schedule = pieces.allocator, pieces.schedule
    plan = image_plan(compression.budget, grid)
    taus = tuple(sorted({*labels.TAUS, allocator.tau}))
    early, late = full.tokens_needed(
        (schedule.first(plan) // grid.row_stride, grid.height),
        row=grid.row_stride,
        taus=taus,
        queries=allocator.grouping_queries,
        include_condition=allocator.include_condition,
    )
    return labels.stability(early, late, min(plan.window(allocator.window_rows), plan.budget), taus)
