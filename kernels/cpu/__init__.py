# SPDX-License-Identifier: Apache-2.0
"""The kernels for the CPU, compiled by numba: the loops of `reference`, over the same storage, without copies."""

from __future__ import annotations

from .attention_behind import attention_behind
from .decode import append_decode, ragged_decode
from .fill_holes import fill_holes
from .gather_regions import gather_regions
from .mean_query_logits import mean_query_logits
from .slot_write import slot_write
from .stratified_victims import stratified_victims
from .tokens_needed import tokens_needed
from .warm_up import warm_up
from .window_mass import head_mass, window_mass
from .window_norms import window_norms
from .window_scores import window_scores

__all__ = [
    "append_decode",
    "attention_behind",
    "fill_holes",
    "gather_regions",
    "head_mass",
    "mean_query_logits",
    "ragged_decode",
    "slot_write",
    "stratified_victims",
    "tokens_needed",
    "warm_up",
    "window_mass",
    "window_norms",
    "window_scores",
]
