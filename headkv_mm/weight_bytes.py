# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's weights, from the model or from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch


def model_class(config: Any) -> Any:
    """The transformers class that generates with a configuration.

    Raises:
        ValueError: if transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for mapping in ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING"):
        found = getattr(modeling_auto, mapping, {})
        if type(config) in found:
            chosen = found[type(config)]
            return chosen[0] if isinstance(chosen, (tuple, list)) else chosen
    # Some models have no Auto class; their main class is named after the configuration.
    name = type(config).__name__.removesuffix("Config") + "ForConditionalGeneration"
    if hasattr(transformers, name):
        return getattr(transformers, name)
    raise ValueError(
        f"transformers has no class that generates with {type(config).__name__}; pass weights=BYTES, or the model"
    )


def empty_model(config: Any) -> torch.nn.Module:
    """The model without weights: every tensor is on the meta device.

    Raises:
        ValueError: see `model_class`.
    """
    chosen = model_class(config)
    with torch.device("meta"):
        model: torch.nn.Module = chosen(config)
    return model


def count_parameters(model_or_config: Any) -> int:
    """Parameters of a model; of a configuration, those that its model would have."""
    model = model_or_config if isinstance(model_or_config, torch.nn.Module) else empty_model(model_or_config)
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model_or_config: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of all parameters and buffers.

    Args:
        model_or_config: a model counts as it is; a configuration as if its model were built, without allocating it.
        dtype: of a configuration's floating-point tensors; what it states by default.

    Raises:
        ValueError: if transformers has no class for the configuration.
    """
    if isinstance(model_or_config, torch.nn.Module):
        return sum(tensor.nbytes for tensor in _tensors(model_or_config))
    dtype = dtype or getattr(model_or_config, "dtype", None) or torch.float32
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in _tensors(empty_model(model_or_config))
    )


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
