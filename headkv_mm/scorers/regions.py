# SPDX-License-Identifier: Apache-2.0
"""The regions of a storage side by side, block by block, for scores that compare the entries of a region."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ragged import RaggedKV


def region_slots(store: RaggedKV) -> tuple[Tensor, Tensor]:
    """The slots of every region [B, G, M] int64 as they lie, and which of them hold an entry.

    M is the host's bound of the lengths, so nothing is read from the device.
    """
    offset = torch.arange(store.max_length, device=store.start.device)
    filled = offset < store.length[..., None]  # [B, G, M]
    return torch.where(filled, store.start[..., None] + offset, 0).long(), filled


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total`."""
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def entries(tensor: Tensor, slots: Tensor, filled: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [N, D] at slots [B, G, M], as [B, G, M, D]; zero where there is no entry.

    Slots that hold nothing are uninitialised memory, so they are replaced and not multiplied by zero.
    """
    return torch.where(filled[..., None], tensor[slots], 0).to(dtype)


def norms(tensor: Tensor) -> Tensor:
    """Euclidean norms of keys or values [N, D], as [N] float32, without a wider copy of them."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype)
    return lengths.float()


def to_slots(values: Tensor, slots: Tensor, filled: Tensor, store: RaggedKV) -> Tensor:
    """Bring values [B, G, M] back to their slots, [N] float32; zero where there is no entry."""
    count = store.positions.shape[0]
    output = torch.zeros(count + 1, dtype=torch.float32, device=values.device)
    output[torch.where(filled, slots, count)] = values.float()  # the last place takes what is empty
    return output[:-1]
