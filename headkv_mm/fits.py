# SPDX-License-Identifier: Apache-2.0
"""What fits: the largest batch for a budget, and the largest budget for a batch. Nothing is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from .budgets import Budget
from .compression import Compression
from .text_plan import SMALLEST
from .workload import Workload, memory_needed

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from .image_grid import ImageGrid

_MOST = 1 << 20
"""The largest batch that is looked for."""


class What(TypedDict, total=False):
    """Keyword arguments of `Workload.of`."""

    guided: bool
    condition: int
    image_grid: ImageGrid | None
    tokens: int | None
    chunk: int | None
    dtype: torch.dtype | None
    weights: int | None


def largest_batch(
    model_or_config: Any,
    compression: Any = "headkv",
    *,
    budget: Budget | None = None,
    memory: int,
    **what: Unpack[What],
) -> int:
    """How many images or texts fit at once beside weights and activations; 0 if not even one.

    Args:
        model_or_config: the model, its configuration, or a `Workload` that says the rest already.
        compression, budget: as for `HeadKVCache`; None for the stock cache.
        memory: bytes there are.
        **what: `guided`, `condition`, `image_grid`, `tokens`, `chunk`, `dtype`, `weights`, see `Workload.of`.

    Raises:
        ValueError: if the budget is too small for any batch, or see `Workload.of`.
    """
    _check_memory(memory)
    workload = _workload(model_or_config, what)
    parsed = Compression.parse(compression, budget=budget)

    def fits(batch: int) -> bool:
        try:
            return bool(memory_needed(workload, parsed, batch=batch).total <= memory)
        except ValueError:
            # A budget in bytes is one for all rows: with many rows too little is left for each. Any other budget that
            # is refused is refused for one row too.
            if isinstance(parsed.budget, str):
                return False
            raise

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def budget_for(
    model_or_config: Any,
    compression: Any = "headkv",
    *,
    batch: int,
    memory: int,
    **what: Unpack[What],
) -> float | int | None:
    """The largest budget with which a batch fits.

    Args:
        model_or_config: the model, its configuration, or a `Workload` that says the rest already.
        compression: as for `HeadKVCache`; its budget does not count.
        batch: images or texts.
        memory: bytes there are.
        **what: `guided`, `condition`, `image_grid`, `tokens`, `chunk`, `dtype`, `weights`, see `Workload.of`.

    Returns:
        Entries per KV head; 1.0 if everything fits; None if not even the smallest budget does.

    Raises:
        ValueError: for the stock cache, which has no budget, or see `Workload.of`.
    """
    _check_memory(memory)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    workload = _workload(model_or_config, what)
    parsed = Compression.parse(compression)
    if not parsed.resolve().compresses:
        raise ValueError("the stock cache has no budget: choose a method, see headkv-mm methods")

    def fits(budget: float | int) -> bool:
        return bool(memory_needed(workload, parsed, batch=batch, budget=budget).total <= memory)

    if fits(1.0):
        return 1.0
    grid = workload.image_grid
    if grid is not None:
        low, high = min(grid.row_stride + 2, grid.tokens), grid.tokens
    else:
        low, high = SMALLEST, max(workload.tokens or 0, SMALLEST + 1)
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_memory(memory: int) -> None:
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory must be a number of bytes, got {memory!r}")
    if memory < 1:
        raise ValueError(f"memory must be at least one byte, got {memory}")


def _workload(model_or_config: Any, what: What) -> Workload:
    """What is generated.

    Raises:
        TypeError: if it is said twice.
    """
    if not isinstance(model_or_config, Workload):
        return Workload.of(model_or_config, **what)
    if what:
        raise TypeError(f"a Workload says {', '.join(what)} already: set it there")
    return model_or_config
