# SPDX-License-Identifier: Apache-2.0
"""Pipelines in the style of transformers whose models run on a compressed KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv_mm.pipelines.factory import pipeline
    from headkv_mm.pipelines.outputs import GenerationReport, ImageOutput
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

_HOMES = {
    "GenerationReport": "outputs",
    "ImageOutput": "outputs",
    "TextToImagePipeline": "text_to_image",
    "pipeline": "factory",
}

__all__ = ["GenerationReport", "ImageOutput", "TextToImagePipeline", "pipeline"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
