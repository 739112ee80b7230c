# SPDX-License-Identifier: Apache-2.0
"""Shape: the sizes of a published model, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.image_grid import ImageGrid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from headkv_mm.workload import Workload


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, and how it is used.

    Attributes:
        name: how users call it.
        title: what it is, in a few words.
        build: makes the configuration; its argument is the number of blocks, None for all of them.
        parameters: the published number of parameters.
        source: where the sizes come from.
        grid: where the image lies; None for a language model.
        guided: images are made with classifier-free guidance: two rows each.
        condition: prompt tokens of a row that plans assume.
        apart: parts of the model's parameter names that the published number does not count (an image encoder, say).
        unconfirmed: what of it could not be looked up at its source; empty if everything was.
    """

    name: str
    title: str
    build: Callable[[int | None], PreTrainedConfig]
    parameters: float
    source: str
    grid: ImageGrid | None = None
    guided: bool = False
    condition: int = 0
    apart: tuple[str, ...] = ()
    unconfirmed: str = ""

    @property
    def kind(self) -> str:
        """What it generates: "image" or "text"."""
        return "text" if self.grid is None else "image"

    def config(self, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedConfig:
        """The configuration, ready to build a model with random weights from.

        Args:
            layers: blocks, to make a small one of the same width; all by default.
            dtype: of the weights.

        Raises:
            ValueError: for fewer than one block.
        """
        if layers is not None and layers < 1:
            raise ValueError(f"a model needs at least 1 layer, got {layers}")
        config = self.build(layers)
        config.dtype = config.get_text_config(decoder=True).dtype = dtype
        return config

    def workload(self, *, tokens: int | None = None, dtype: torch.dtype = torch.bfloat16, **what: Any) -> Workload:
        """What plans need to know; `tokens` for a language model, `what` as for `Workload.of`."""
        from headkv_mm.workload import Workload

        defaults = {"guided": self.guided, "condition": self.condition, "image_grid": self.grid}
        chosen = {**(defaults if tokens is None else {}), **what}
        return Workload.of(self.config(dtype=dtype), tokens=tokens, dtype=dtype, **chosen)
