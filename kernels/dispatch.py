# SPDX-License-Identifier: Apache-2.0
"""One function per kernel, with the signature of `reference`; the backend is picked per call from the tensors.

    cuda, hip                       -> triton     (`kernels.gpu`)
    cpu, float32/float16/bfloat16   -> numba      (`kernels.cpu`)
    everything else                 -> reference  (plain torch)

`HEADKV_MM_KERNELS=reference|numba|triton` forces one backend. Backends are imported at their first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from .mass_kinds import MassOf

ENVIRONMENT_VARIABLE = "HEADKV_MM_KERNELS"
BACKENDS = {"reference": ".reference", "numba": ".cpu", "triton": ".gpu"}
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    if not found:
        warnings.warn(
            f"{package} is not installed, so kernels fall back to plain torch, which is correct but slow. "
            f"Install {package}, or set {ENVIRONMENT_VARIABLE}=reference to silence this.",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


def _forced(choice: str, tensor: Tensor) -> str:
    if choice not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={choice!r} is not a backend: choose one of {', '.join(BACKENDS)}")
    if choice == "numba" and (tensor.device.type != "cpu" or tensor.dtype not in HALF_AND_SINGLE):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}=numba needs float32, float16 or bfloat16 tensors on the CPU, got {tensor.dtype} "
            f"on {tensor.device}: unset the variable, or choose reference"
        )
    return choice


def backend_for(tensor: Tensor) -> str:
    """Name the backend that serves this tensor: "reference", "numba" or "triton".

    Raises:
        ValueError: the environment variable `HEADKV_MM_KERNELS` names no backend, or one that cannot take the tensor.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE)
    if choice:
        return _forced(choice, tensor)
    if tensor.dtype in HALF_AND_SINGLE:
        if tensor.is_cpu:
            return "numba" if _installed("numba") else "reference"
        # HIP devices are called cuda in torch; the other name is accepted as well.
        if tensor.device.type in ("cuda", "hip") and _installed("triton"):
            return "triton"
    return "reference"


@functools.cache
def _load(backend: str) -> Any:
    return importlib.import_module(BACKENDS[backend], __package__)


def _module(tensor: Tensor) -> Any:
    return _load(backend_for(tensor))


def slot_write(
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Append one entry to every region, in place. See `reference.slot_write`."""
    _module(keys).slot_write(new_keys, new_values, new_positions, keys, values, positions, start, length, mass)


def ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mass: Tensor | None = None,
    mass_of: MassOf = "attention",
) -> Tensor:
    """Attention of one query token per row over its regions, [B, H, D]. See `reference.ragged_decode`."""
    out: Tensor = _module(keys).ragged_decode(
        query,
        keys,
        values,
        start,
        length,
        scale=scale,
        max_length=max_length,
        softcap=softcap,
        sinks=sinks,
        mass=mass,
        mass_of=mass_of,
    )
    return out


def append_decode(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    max_length: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mass: Tensor | None = None,
    mass_of: MassOf = "attention",
) -> Tensor:
    """`slot_write` and `ragged_decode` in one pass, [B, H, D]. See `reference.append_decode`."""
    out: Tensor = _module(keys).append_decode(
        query,
        new_keys,
        new_values,
        new_positions,
        keys,
        values,
        positions,
        start,
        length,
        scale=scale,
        max_length=max_length,
        softcap=softcap,
        sinks=sinks,
        mass=mass,
        mass_of=mass_of,
    )
    return out


def window_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean attention of a window of queries, per slot, [N] float32. See `reference.window_mass`."""
    storage, options = (keys, positions, start, length), {"first_position": first_position, "sinks": sinks}
    out: Tensor = _module(keys).window_mass(queries, query_positions, *storage, scale=scale, softcap=softcap, **options)
    return out


def window_scores(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    pool: int = 1,
    pooling: str = "max",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`window_mass` pooled over neighbouring slots, [N] float32. See `reference.window_scores`."""
    storage, options = (keys, positions, start, length), {"pool": pool, "pooling": pooling}
    out: Tensor = _module(keys).window_scores(
        queries, query_positions, *storage, scale=scale, softcap=softcap, sinks=sinks, **options
    )
    return out


def window_norms(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    value_norms: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Norm of what each slot adds to the output, [N] float32. See `reference.window_norms`."""
    out: Tensor = _module(keys).window_norms(
        queries,
        query_positions,
        keys,
        positions,
        start,
        length,
        value_norms,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
    return out


def attention_behind(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    window: Tensor,
    *,
    scale: float,
    power: int = 1,
    first_position: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that queries give to what lies behind their windows, [B, G]. See `reference.attention_behind`."""
    storage, options = (keys, positions, start, length), {"first_position": first_position, "sinks": sinks}
    out: Tensor = _module(keys).attention_behind(
        queries, query_positions, *storage, window, scale=scale, power=power, softcap=softcap, **options
    )
    return out


def tokens_needed(mass: Tensor, positions: Tensor, start: Tensor, length: Tensor, *, tau: float) -> Tensor:
    """How many of the newest entries hold a share `tau` of the mass, [B, G]. See `reference.tokens_needed`."""
    out: Tensor = _module(mass).tokens_needed(mass, positions, start, length, tau=tau)
    return out


def head_mass(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    tau: float,
    first_position: Tensor | None = None,
) -> Tensor:
    """Tokens needed for a share `tau` of the window's attention, [B, G] int32. See `reference.head_mass`."""
    mass = window_mass(
        queries, query_positions, keys, positions, start, length, scale=scale, first_position=first_position
    )
    return tokens_needed(mass, positions, start, length, tau=tau)


def mean_query_logits(mean_query: Tensor, keys: Tensor, start: Tensor, length: Tensor, *, scale: float) -> Tensor:
    """Logit of the mean query for every slot, [N] float32. See `reference.mean_query_logits`."""
    out: Tensor = _module(keys).mean_query_logits(mean_query, keys, start, length, scale=scale)
    return out


def stratified_victims(
    scores: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    evict: Tensor,
    strata_ratio: float,
) -> Tensor:
    """Choose what leaves each region, [N] bool. See `reference.stratified_victims`."""
    out: Tensor = _module(scores).stratified_victims(
        scores, positions, start, length, first=first, last=last, evict=evict, strata_ratio=strata_ratio
    )
    return out


def fill_holes(
    victims: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    mass: Tensor | None = None,
) -> None:
    """Remove the victims and keep every region packed, in place. See `reference.fill_holes`."""
    _module(keys).fill_holes(victims, keys, values, positions, start, length, mass)


def gather_regions(
    rows: Tensor,
    keep: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    new_positions: Tensor,
    new_start: Tensor,
    new_length: Tensor,
    mass: Tensor | None = None,
    new_mass: Tensor | None = None,
) -> None:
    """Copy kept entries into new regions. See `reference.gather_regions`."""
    _module(keys).gather_regions(
        rows,
        keep,
        keys,
        values,
        positions,
        start,
        length,
        new_keys,
        new_values,
        new_positions,
        new_start,
        new_length,
        mass,
        new_mass,
    )
