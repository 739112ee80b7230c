# SPDX-License-Identifier: Apache-2.0
"""Kernels over the ragged cache. They know tensors only; `dispatch` picks the backend by device."""

from __future__ import annotations

from .dispatch import (
    append_decode,
    attention_behind,
    backend_for,
    fill_holes,
    gather_regions,
    head_mass,
    mean_query_logits,
    ragged_decode,
    slot_write,
    stratified_victims,
    tokens_needed,
    window_mass,
    window_norms,
    window_scores,
)

__all__ = [
    "append_decode",
    "attention_behind",
    "backend_for",
    "fill_holes",
    "gather_regions",
    "head_mass",
    "mean_query_logits",
    "ragged_decode",
    "slot_write",
    "stratified_victims",
    "tokens_needed",
    "window_mass",
    "window_norms",
    "window_scores",
]
