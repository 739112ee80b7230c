# SPDX-License-Identifier: Apache-2.0
"""Image decoders that come beside a model: diffusers' `VQModel`, or any callable."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Decoder = Callable[[Tensor], Tensor]
"""Codes int64 [B, h, w] to pixels: uint8, or floats in [-1, 1]; [B, H, W, 3] or [B, 3, H, W]."""


def image_decoder(given: Any, codes: int) -> Decoder:
    """A decoder of an image's codes.

    Args:
        given: a diffusers `VQModel`, its folder, or a callable.
        codes: size of the model's codebook.

    Raises:
        ValueError: if the folder cannot be read, or the decoder knows fewer codes.
        TypeError: for anything else.
    """
    if isinstance(given, str | os.PathLike):
        given = _load(os.fspath(given))
    known = getattr(getattr(given, "config", None), "num_vq_embeddings", None)
    if known is None:
        if not callable(given):
            raise TypeError(
                "image_decoder must be a diffusers VQModel, its folder, or a callable of codes int64 [B, h, w] that "
                f"gives pixels uint8 [B, H, W, 3]; got {type(given).__name__}"
            )
        return _checked(given)
    if known < codes:
        raise ValueError(
            f"this image_decoder knows {known} codes and the model draws {codes}: they do not belong together"
        )
    return _VQDecoder(given)


class _VQDecoder:
    """A `VQModel` from codes to floats in [-1, 1]."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def __call__(self, codes: Tensor) -> Tensor:
        """[B, 3, H, W] of int64 [B, h, w]."""
        model = self._model
        latents = model.quantize.get_codebook_entry(
            codes.to(model.device).flatten(), (*codes.shape, model.config.vq_embed_dim or model.config.latent_channels)
        )  # [B, D, h, w]
        spatial = latents if model.config.norm_type == "spatial" else None
        pixels: Tensor = model.decoder(model.post_quant_conv(latents), spatial)
        return pixels


def _checked(decode: Decoder) -> Decoder:
    def run(codes: Tensor) -> Tensor:
        pixels = decode(codes)
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) != len(codes):
            found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"image_decoder must give a tensor [B, H, W, 3] for codes {list(codes.shape)}, it gave {found}"
            )
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise ValueError(f"image_decoder must give uint8, or floats in [-1, 1]; it gave {pixels.dtype}")
        return pixels

    return run


def _load(folder: str) -> Any:
    from diffusers import VQModel

    from headkv_mm.pipelines.loading import first_line

    try:
        return VQModel.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no diffusers VQModel that can be read as image_decoder ({first_line(error)})"
        ) from error
