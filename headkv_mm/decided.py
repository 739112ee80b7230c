# SPDX-License-Identifier: Apache-2.0
"""Decided: how the heads of one row share its budget, as it was decided once, and as it grows with a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .allocators.shares import scaled
from .compressor import tensor_fields
from .pieces import Allocation


@dataclass(frozen=True)
class Decided:
    """One row's allocation.

    Attributes:
        allocation: of one row, [1, G]; under tensor parallelism over the heads of all processes, so that it grows in
            each as it would in one, and on the CPU.
        budget: entries per KV head, after the sinks, on the average over the model, for which it was made.
    """

    allocation: Allocation
    budget: int

    @classmethod
    def of(cls, allocation: Allocation, row: int, budget: int, *, on_host: bool = False) -> Decided:
        """Take one row, with tensors of its own."""
        tensors: dict[str, Any] = {
            name: tensor[row : row + 1].clone() for name, tensor in tensor_fields(allocation).items()
        }
        if on_host:
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        before = allocation.row_before
        return cls(
            replace(
                allocation,
                row_totals=[allocation.row_totals[row]],
                row_before=before and [before[row]],
                **tensors,
            ),
            budget,
        )

    def grown(self, budget: int) -> Allocation:
        """The allocation in proportion to another budget; a window that was the whole target stays so.

        Where layers keep different numbers of entries, a layer's new total is the difference of two rounded sums over
        the layers before and up to it, so that the totals of all layers add up exactly without asking the others.
        """
        old = self.allocation
        if budget == self.budget:
            return old
        before = 0 if old.row_before is None else old.row_before[0]
        now_before = before * budget // self.budget
        total = (before + old.row_totals[0]) * budget // self.budget - now_before
        if old.alike:
            total -= total % old.targets.shape[-1]
        targets = scaled(old.targets, total)
        windows = torch.where(old.windows == old.targets, targets, old.windows.minimum(targets))
        return replace(
            old,
            targets=targets,
            windows=windows.to(torch.int32),
            row_totals=[total],
            largest=old.largest * total // old.row_totals[0] + 1,
            row_before=None if old.row_before is None else [now_before],
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return tensor_fields(self.allocation)

    @property
    def numbers(self) -> dict[str, Any]:
        """What is on the host, as JSON types."""
        kept = self.allocation
        return {
            "row_totals": kept.row_totals,
            "largest": kept.largest,
            "row_before": kept.row_before,
            "alike": kept.alike,
            "budget": self.budget,
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Decided:
        """From what `tensors` and `numbers` gave.

        Raises:
            KeyError: if something is missing.
        """
        return cls(
            Allocation(
                targets=tensors["targets"],
                windows=tensors["windows"],
                row_totals=numbers["row_totals"],
                largest=numbers["largest"],
                local=tensors.get("local"),
                row_before=numbers["row_before"],
                alike=numbers.get("alike", False),
            ),
            numbers["budget"],
        )
