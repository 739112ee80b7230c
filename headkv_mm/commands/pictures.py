# SPDX-License-Identifier: Apache-2.0
"""Images as they are written to files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL, _COMFORTABLE = 256, 512  # pixels: what is enlarged, and to how much


def enlarged(image: Image, scale: int | None) -> Image:
    """The image with sharp token edges, `scale` times as large, or small ones as large as is comfortable to see."""
    from PIL import Image as PillowImage

    if scale is None:
        side = max(image.size)
        scale = _COMFORTABLE // side if side < _SMALL else 1
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), PillowImage.Resampling.NEAREST)
