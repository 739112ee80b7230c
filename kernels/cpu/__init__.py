# SPDX-License-Identifier: Apache-2.0
"""The kernels for the CPU, compiled by numba: the loops of `reference`, over the same storage, without copies."""

from __future__ import annotations

from ..reference import (
    fill_holes,
    gather_regions,
    mean_query_logits,
    stratified_victims,
    tokens_needed,
    window_mass,
)
from .decode import append_decode, ragged_decode, slot_write

__all__ = [
    "append_decode",
    "fill_holes",
    "gather_regions",
    "mean_query_logits",
    "ragged_decode",
    "slot_write",
    "stratified_victims",
    "tokens_needed",
    "window_mass",
]
