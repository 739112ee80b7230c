# SPDX-License-Identifier: Apache-2.0
"""The image models that the pipeline can drive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.models.base import ImageModelAdapter
from headkv_mm.pipelines.models.chameleon import ChameleonAdapter
from headkv_mm.pipelines.models.emu3 import Emu3Adapter
from headkv_mm.pipelines.models.glm_image import GlmImageAdapter
from headkv_mm.pipelines.models.janus import JanusAdapter
from headkv_mm.pipelines.models.llamagen import LlamaGenAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ADAPTERS: list[type[ImageModelAdapter]] = [
    LlamaGenAdapter,
    JanusAdapter,
    ChameleonAdapter,
    Emu3Adapter,
    GlmImageAdapter,
]

__all__ = ["adapter_class_for", "adapter_for", "architectures", "register_adapter"]


def register_adapter(adapter: type[ImageModelAdapter]) -> type[ImageModelAdapter]:
    """Add an adapter class; the last one that recognises a configuration is used. Works as a decorator."""
    if not (isinstance(adapter, type) and issubclass(adapter, ImageModelAdapter)):
        raise TypeError(f"an adapter must be a subclass of ImageModelAdapter, got {adapter!r}")
    if adapter not in _ADAPTERS:
        _ADAPTERS.append(adapter)
    return adapter


def architectures() -> list[str]:
    """Names of the architectures that have an adapter."""
    return [adapter.architecture for adapter in _ADAPTERS]


def adapter_class_for(config: PreTrainedConfig) -> type[ImageModelAdapter]:
    """The adapter class for a model's configuration.

    Raises:
        ValueError: if there is none.
    """
    for adapter in reversed(_ADAPTERS):
        if adapter.recognises(config):
            return adapter
    raise ValueError(
        f"no adapter draws images with a model of type {getattr(config, 'model_type', None)!r}: "
        f"the text-to-image pipeline serves {', '.join(architectures())}"
    )


def adapter_for(
    model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
) -> ImageModelAdapter:
    """An adapter for a loaded model.

    Raises:
        ValueError: if no adapter knows the model, or the adapter misses something.
    """
    chosen = adapter_class_for(model.config)
    return chosen(model, tokenizer=tokenizer, processor=processor, image_decoder=image_decoder)
