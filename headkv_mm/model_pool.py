# SPDX-License-Identifier: Apache-2.0
"""ModelPool: where the layers of one cache meet when they divide one budget by what each of them has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compressor import LayerCompressor


class ModelPool:
    """Layers whose rows are to be divided wait here, in the order of the model, until the last one comes.

    A text's layers have dropped what they will not need (see `ModelAllocator.preselect`), so that what waits is a few
    budgets, never the prompt; an image's hold the few rows written so far. Nothing waits between two forwards.
    """

    def __init__(self) -> None:
        self._waiting: list[LayerCompressor] = []

    def wait(self, layer: LayerCompressor) -> None:
        """Take one layer; with the last one, divide the budget among all and let them evict the rest.

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
        for one, allocation in zip(waiting, settled, strict=True):
            one.settle(allocation)
