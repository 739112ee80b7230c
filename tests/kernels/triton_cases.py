# SPDX-License-Identifier: Apache-2.0
"""Storage for the checks of the Triton launchers: regions shuffled in memory, and poison everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

NAN = float("nan")
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
WEIGHT_TOLERANCE = 2e-5  # weights and logits are float32 whatever the storage


@dataclass
class Storage:
    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor
    mass: Tensor
    generator: torch.Generator = field(repr=False)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.keys.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32).to(self.device)

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.positions, self.start, self.length]

    def copy(self, dtype: torch.dtype | None = None) -> Storage:
        """A copy, with keys and values in another dtype if asked for."""
        keys, values = (
            self.keys.to(dtype or self.keys.dtype, copy=True),
            self.values.to(dtype or self.values.dtype, copy=True),
        )
        return Storage(
            keys,
            values,
            self.positions.clone(),
            self.start.clone(),
            self.length.clone(),
            self.mass.clone(),
            self.generator,
        )


def storage(
    lengths: list[list[int]], size: int, dtype: torch.dtype, device: str, *, slack: int = 3, seed: int = 0
) -> Storage:
    """Regions of the given lengths [B][G], shuffled in memory, each followed by `slack` free slots."""
    generator = torch.Generator().manual_seed(seed)
    flat = [n for row in lengths for n in row]
    starts = [0] * len(flat)
    end = 5
    for region in torch.randperm(len(flat), generator=generator).tolist():
        starts[region] = end
        end += flat[region] + slack
    keys, values = torch.full((end, size), NAN), torch.full((end, size), NAN)
    positions, mass = torch.full((end,), -7, dtype=torch.int32), torch.full((end,), NAN)
    for begin, n in zip(starts, flat):
        region_slots = slice(begin, begin + n)
        keys[region_slots] = torch.randn(n, size, generator=generator)
        values[region_slots] = torch.randn(n, size, generator=generator)
        positions[region_slots] = torch.randperm(2 * n, generator=generator)[:n].int()  # with gaps, in no order
        # Sixteenths add up exactly in float32, in any order.
        mass[region_slots] = torch.randint(0, 9, (n,), generator=generator) / 16
    shape = (len(lengths), len(lengths[0]))
    return Storage(
        keys.to(dtype).to(device),
        values.to(dtype).to(device),
        positions.to(device),
        torch.tensor(starts, dtype=torch.int32, device=device).view(shape),
        torch.tensor(flat, dtype=torch.int32, device=device).view(shape),
        mass.to(device),
        generator,
    )


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def same(got: Storage, expected: Storage) -> None:
    """Equal in every slot, NaN included."""
    for name in ("keys", "values", "positions", "start", "length", "mass"):
        torch.testing.assert_close(
            getattr(got, name).double(),
            getattr(expected, name).double(),
            atol=0,
            rtol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def block(size: int, dtype: torch.dtype) -> int:
    """Slots per tile of the decode kernels, so that lengths can sit on both sides of it."""
    return min(128, max(16, 16384 // (max(16, 1 << (size - 1).bit_length()) * dtype.itemsize)))
