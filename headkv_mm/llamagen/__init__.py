# SPDX-License-Identifier: Apache-2.0
"""Autoregressive image generation with Llama blocks on a grid of image tokens (LlamaGen, arXiv:2406.06525)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Whoever waits for this module to register LlamaGen must do so before a module of this package is half imported.
import transformers.models.auto.configuration_auto  # noqa: F401

if TYPE_CHECKING:
    from headkv_mm.llamagen.configuration import LlamaGenConfig
    from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration
    from headkv_mm.llamagen.registration import register

_HOMES = {
    "LlamaGenConfig": "configuration",
    "LlamaGenForConditionalGeneration": "modeling",
    "register": "registration",
}

__all__ = ["LlamaGenConfig", "LlamaGenForConditionalGeneration", "register"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the model code pulls in much of transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
