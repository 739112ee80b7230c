# SPDX-License-Identifier: Apache-2.0
"""Pictures of what an image decoder gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor


@torch.no_grad()
def pictures_of(tokens: Tensor, decode: Callable[[Tensor], Tensor]) -> list[Image.Image]:
    """RGB pictures, decoded one by one.

    Kernels sum in another order for another batch, which would move some pixel by one level; alone, a picture is the
    same in every batch. It is also the least memory.

    Args:
        tokens: integers [B, ...].
        decode: called with [1, ...]; gives floats in [-1, 1] or uint8, as [1, H, W, 3] or [1, 3, H, W].
    """
    return [to_picture(decode(row[None])[0]) for row in tokens]


def to_picture(pixels: Tensor) -> Image.Image:
    """A picture of floats in [-1, 1] or uint8, [H, W, 3] or [3, H, W].

    Raises:
        ValueError: for another shape.
    """
    if pixels.dim() != 3 or 3 not in (pixels.shape[0], pixels.shape[-1]):
        raise ValueError(f"expected pixels of shape [H, W, 3] or [3, H, W], got {tuple(pixels.shape)}")
    if pixels.shape[-1] != 3:
        pixels = pixels.permute(1, 2, 0)  # [H, W, 3]
    if pixels.dtype != torch.uint8:
        pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().contiguous().numpy())
