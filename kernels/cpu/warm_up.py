# SPDX-License-Identifier: Apache-2.0
"""Compile every CPU kernel ahead of its first use."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .attention_behind import worker_for as attention_behind_worker_for
from .decode import decode_worker_for, plan_worker
from .fill_holes import worker_for as fill_holes_worker_for
from .gather_regions import worker_for as gather_regions_worker_for
from .mean_query_logits import worker_for as mean_query_logits_worker_for
from .slot_write import worker_for as slot_write_worker_for
from .stratified_victims import the_worker as stratified_victims_worker
from .tokens_needed import the_worker as tokens_needed_worker
from .window_mass import worker_for as window_mass_worker_for
from .window_norms import worker_for as window_norms_worker_for
from .window_scores import the_worker as pool_worker


def warm_up(dtypes: Iterable[torch.dtype] = (torch.float32,), head_sizes: Iterable[int] = ()) -> None:
    """Compile the kernels for these dtypes, and cache them on disk.

    About 30 s for the first dtype and 20 s for each further one; nearly nothing when they are in the cache already.

    Args:
        dtypes: float32, float16 or bfloat16.
        head_sizes: accepted because other backends compile per head size; the loops here take any.

    Raises:
        TypeError: another dtype.
    """
    del head_sizes
    for dtype in dtypes:
        decode_worker_for(dtype)
        slot_write_worker_for(dtype)
        window_mass_worker_for(dtype)
        window_norms_worker_for(dtype)
        attention_behind_worker_for(dtype)
        mean_query_logits_worker_for(dtype)
        fill_holes_worker_for(dtype)
        gather_regions_worker_for(dtype)
    stratified_victims_worker()
    tokens_needed_worker()
    plan_worker()
    pool_worker()
