# SPDX-License-Identifier: Apache-2.0
"""Runs of an adapter below the pipeline, for `image_oracle` to look into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headkv_mm import Compression
from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling

from .image_oracle import Trace, masked_again, tracing

FULL = Compression("none")


@dataclass(frozen=True)
class Watched:
    """A run whose guidance lies in the batch: what it gave, and what happened in it."""

    made: GeneratedTokens
    trace: Trace

    @property
    def scores(self) -> Tensor:
        """[steps, R, K], guidance rows too."""
        return torch.stack(self.trace.logits)


def runner(
    adapter: ImageModelAdapter, prompts: EncodedPrompts, compression: Compression = FULL, **sampling: Any
) -> Callable[[], GeneratedTokens]:
    """Generates with the adapter, greedily unless `sampling` says otherwise."""
    settings = adapter.sampling_for(Sampling(**{"do_sample": False, **sampling}), prompts.grid)
    seeds = list(range(len(prompts.prompts)))
    return lambda: adapter.generate(prompts, sampling=settings, seeds=seeds, compression=compression)


def watch(
    adapter: ImageModelAdapter,
    prompts: EncodedPrompts,
    head: nn.Module,
    compression: Compression = FULL,
    **sampling: Any,
) -> Watched:
    """Run and record; `head` gives the scores."""
    with tracing(adapter.model, head) as trace:
        return Watched(runner(adapter, prompts, compression, **sampling)(), trace)


def oracle_scores(
    adapter: ImageModelAdapter, prompts: EncodedPrompts, head: nn.Module, run: Watched, pads: list[int], **sampling: Any
) -> Tensor:
    """Scores of a full cache that sees, by row and head, only what `run` saw; `pads` has the padding of each row."""
    run_full = runner(adapter, prompts, **sampling)
    return torch.stack(masked_again(adapter.model, head, run.trace, [pads], run_full).logits)


def full_scores(
    adapter: ImageModelAdapter, prompts: EncodedPrompts, head: nn.Module, run: Watched, **sampling: Any
) -> Tensor:
    """Scores of a full cache along the tokens of `run`."""
    with tracing(adapter.model, head, again=run.trace) as found:
        runner(adapter, prompts, **sampling)()
    return torch.stack(found.logits)
