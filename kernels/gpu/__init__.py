# SPDX-License-Identifier: Apache-2.0
"""The kernels in Triton, for NVIDIA and AMD devices. Same functions as `headkv_mm.kernels.reference`.

No launcher waits for the device, except a decode that is not told `max_length`. Importing this package imports triton.
"""

from __future__ import annotations

from .append_decode import append_decode
from .attention_behind import attention_behind
from .common import SUPPORTED_DTYPES
from .fill_holes import fill_holes
from .gather_regions import gather_regions
from .mean_query_logits import mean_query_logits
from .ragged_decode import ragged_decode
from .slot_write import slot_write
from .stratified_victims import stratified_victims
from .tokens_needed import head_mass, tokens_needed
from .window_mass import window_mass
from .window_norms import window_norms
from .window_scores import window_scores

__all__ = [
    "SUPPORTED_DTYPES",
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
    "window_mass",
    "window_norms",
    "window_scores",
]
