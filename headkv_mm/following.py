# SPDX-License-Identifier: Apache-2.0
"""Following: what one layer has to do with the choice of tokens that go on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .chosen_mask import chosen_mask
from .pieces import Scorer
from .plan import LayerPlace, Plan
from .prompt import Reading
from .propagation import Propagation, Selection, observe_reading
from .text_plan import TextPlan


@dataclass(frozen=True)
class Following:
    """A layer, and what says which tokens go on.

    Attributes:
        place: the layer.
        propagation: of the cache; None where all tokens go on.
    """

    place: LayerPlace
    propagation: Propagation | None = None

    @property
    def chooser(self) -> Propagation | None:
        """The propagation, if this is the layer that says which tokens go on."""
        found = self.propagation
        return found if found is not None and found.layer == self.place.index < self.place.count - 1 else None

    @property
    def incoming(self) -> Selection | None:
        """The tokens of the forward under way that reach this layer; None for all of them."""
        return None if self.propagation is None else self.propagation.incoming(self.place.index)

    def choose(
        self, plan: Plan | None, row_before: list[int], row_seen: list[int], tokens: int, visible: Tensor | None
    ) -> None:
        """After a prompt or chunk: say which of its tokens go on, if this layer does.

        Args:
            plan: of the layer.
            row_before, row_seen: real tokens of each row before and after.
            tokens: columns of the prompt or chunk.
            visible: [B, T] bool, False for padding; None if there is none.
        """
        if self.chooser is not None and isinstance(plan, TextPlan):
            new = [after - before for after, before in zip(row_seen, row_before, strict=True)]
            self.chooser.choose(plan, row_before, new, tokens, visible)

    def choose_reading(
        self,
        reading: Reading,
        scorer: Scorer,
        plan: Plan | None,
        keys: Tensor,
        values: Tensor,
        tokens: int,
        visible: Tensor | None,
    ) -> None:
        """The same while a prompt is being read.

        Args:
            reading: with its last chunk.
            scorer: of the method.
            plan: of the layer.
            keys, values: [B, G, P, D] so far.
            tokens: columns of the last chunk.
            visible: [B, T] bool, False for padding in it; None if there is none.
        """
        if self.chooser is not None and isinstance(plan, TextPlan):
            observed = observe_reading(reading, plan, keys, values)
            self.chooser.choose_reading(scorer, observed, plan, tokens, visible)


def mask_for(selection: Selection, reading: Reading | None, stock: Tensor | None) -> Tensor | None:
    """The mask of a layer's attention for a forward of which only some tokens come.

    Args:
        selection: those that come.
        reading: the prompt that is being read, if one is.
        stock: the mask for all of them.
    """
    read = None if reading is None else reading.passed
    return chosen_mask(selection, None if read is None else read.visible, stock)
