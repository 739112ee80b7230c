# SPDX-License-Identifier: Apache-2.0
"""ImageGrid: where the image lies in the sequence of generated tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageGrid:
    """Raster order of an image's tokens.

    Attributes:
        height, width: tokens of the picture.
        row_stride: tokens of one raster row, newline token included; the width unless the model writes newlines.
        start: generated tokens that come before the image and count as condition (a preview, say).
    """

    height: int
    width: int
    row_stride: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"ImageGrid.{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.row_stride == 0:
            object.__setattr__(self, "row_stride", self.width)
        if self.row_stride < self.width:
            raise ValueError(
                f"ImageGrid.row_stride ({self.row_stride}) must be at least the width ({self.width}): "
                "it counts the tokens of one row, newline included"
            )
        if self.start < 0:
            raise ValueError(f"ImageGrid.start must not be negative, got {self.start}")

    @property
    def tokens(self) -> int:
        """Image tokens, newlines included."""
        return self.height * self.row_stride

    @classmethod
    def from_config(cls, config: Any) -> ImageGrid | None:
        """The grid that a model's configuration states, or None if it states none.

        Reads `image_height` and `image_width` (LlamaGenConfig), or the square grid of `vision_config.num_image_tokens`
        where there is a `vq_config` to draw with (Janus). A model that only looks at images may state a number of them
        too (PaliGemma).
        """
        height, width = getattr(config, "image_height", None), getattr(config, "image_width", None)
        if isinstance(height, int) and isinstance(width, int):
            return cls(height, width)
        if getattr(config, "vq_config", None) is None:
            return None
        count = getattr(getattr(config, "vision_config", None), "num_image_tokens", None)
        if isinstance(count, int) and count > 0 and math.isqrt(count) ** 2 == count:
            return cls(math.isqrt(count), math.isqrt(count))
        return None
