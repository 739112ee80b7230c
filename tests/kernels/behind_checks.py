# SPDX-License-Identifier: Apache-2.0
"""The check of `attention_behind`, one of those in `triton_checks`."""

from __future__ import annotations

from typing import Any

import torch

from headkv_mm.kernels import reference

from .triton_cases import WEIGHT_TOLERANCE, close, storage


def check_attention_behind(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Groups of one and more, pad queries, windows by row, every option; more queries than one tile; no query at all.

    The result is a sum over many slots, so it is compared relative to its size.
    """
    for group, window, size, power, first, softcap, sinks in (
        (2, 5, 80, 2, False, 0.0, None),
        (1, 37, 16, 2, True, 2.0, None),
        (3, 9, 32, 1, True, 0.0, torch.tensor([0.5, -1.0, float("-inf"), 3.0, 0.0, 1.0])),
    ):
        s = storage([[0, 1], [2, 33], [90, 47]], size, dtype, device, seed=window)
        queries = s.normal(3, window, 2 * group, size)
        query_positions = s.integers(0, 200, 3, window)
        query_positions[0, ::2] = -1
        query_positions[1, :2] = -1
        behind = torch.tensor([0, 8, 30], dtype=torch.int32, device=device)
        options = {
            "scale": 0.3,
            "power": power,
            "first_position": torch.tensor([0, 3, 7], dtype=torch.int32, device=device) if first else None,
            "softcap": softcap,
            "sinks": None if sinks is None else sinks.to(device),
        }
        arguments = (s.positions, s.start, s.length, behind)
        got = backend.attention_behind(queries, query_positions, s.keys, *arguments, **options)
        want = reference.attention_behind(queries.double(), query_positions, s.keys.double(), *arguments, **options)
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        assert want[2].gt(0).all()
        assert want[0, 0] == 0
        close(got, want, WEIGHT_TOLERANCE)
        close(got / want.clamp(min=1e-30), want / want.clamp(min=1e-30), 10 * WEIGHT_TOLERANCE)
        query_positions[1] = -1
        assert backend.attention_behind(queries, query_positions, s.keys, *arguments, **options)[1].eq(0).all()
