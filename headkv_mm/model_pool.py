# SPDX-License-Identifier: Apache-2.0
"""ModelPool: where the layers of one cache meet when they divide one budget by what each of them has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pieces import Allocation, Observed

if TYPE_CHECKING:
    from .compressor import LayerCompressor

_WORTH_A_COPY = 1.125
"""A waiting layer is copied once it holds so many times what it can still get.

So every copy frees at least a ninth of the layer, all copies of a layer together move at most eight times what it held
first, and what waits is at most an eighth more than what the layers can get.
"""


class ModelPool:
    """Layers whose rows are to be divided wait here, in the order of the model, until the last one comes.

    A text's layers have dropped what they cannot get any more (see `ModelAllocator.at_most`), and drop more when other
    layers come, so that what waits is about the budget of the whole model, never the prompt; an image's hold the few
    rows written so far. Nothing waits between two forwards.

    Attributes:
        nbytes_peak: the most bytes that the layers of the cache held together whenever one of them said what it holds.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._waiting: list[LayerCompressor] = []
        self._held: dict[int, int] = {}
        self._prompt = 0
        self.nbytes_peak = 0

    def note(self, index: int, nbytes: int, *, passing: int = 0) -> None:
        """Layer `index` holds so many bytes from now on; `passing` are those that it is just letting go."""
        self._held[index] = nbytes
        self.nbytes_peak = max(self.nbytes_peak, sum(self._held.values()) + passing + self._prompt)

    def narrow(self, layer: LayerCompressor, observed: Observed, scores: Tensor) -> Allocation:
        """What a text's layer, which has just come, must keep. Layers that wait drop what they cannot get any more.

        One small table is read from the device.

        Args:
            layer: it is to `wait` then.
            observed, scores: what it holds, and what was noted of it.
        """
        if layer.plan.place.index == 0:
            self._waiting = []  # an error may have ended an earlier forward between two layers
        layers = [*(one.waiting() for one in self._waiting), (observed, scores)]
        bounds = layer.model_allocator.at_most(layers)
        device = observed.seen.device
        numbers = [torch.stack([targets.sum(-1), targets.amax(-1)]).to(device) for targets, _ in bounds]  # [2, B]
        *narrowed, own = (
            Allocation(
                targets=targets.to(torch.int32),
                windows=windows.to(torch.int32).expand_as(targets).contiguous(),
                row_totals=totals,
                largest=max(largest),
            )
            for (targets, windows), (totals, largest) in zip(bounds, torch.stack(numbers).tolist(), strict=True)
        )
        for one, allocation in zip(self._waiting, narrowed, strict=True):
            one.narrow(allocation, worth=_WORTH_A_COPY)
        return own

    def wait(self, layer: LayerCompressor, *, prompt: int = 0) -> None:
        """Take one layer; with the last one, divide the budget among all and let them evict the rest.

        Args:
            layer: it holds what it may get.
            prompt: bytes of its dense prompt, if that is still there.

        Raises:
            RuntimeError: if a layer is missing.
        """
        place = layer.plan.place
        if place.index == 0:
            self._waiting = []  # an error may have ended an earlier forward between two layers
        self._waiting.append(layer)
        if place.index < place.count - 1:
            return
        waiting, self._waiting = self._waiting, []
        if [one.plan.place.index for one in waiting] != list(range(place.count)):
            raise RuntimeError(
                f"a budget over all layers needs all {place.count} of them in one forward, in their order, and "
                f"{len(waiting)} came; use scope='layer'"
            )
        settled = layer.model_allocator.divide([one.waiting() for one in waiting])
        self._prompt = prompt
        for one, allocation in zip(waiting, settled, strict=True):
            one.settle(allocation)
        self._prompt = 0
