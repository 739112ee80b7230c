# SPDX-License-Identifier: Apache-2.0
"""On which devices a model computes, also where accelerate keeps its weights elsewhere until they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def input_device(model: Any) -> torch.device:
    """Where a model's first layer computes; `model.device` may be "meta", where offloaded weights only seem to be."""
    embedding: nn.Module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    return computing_device(embedding, model)


def layer_devices(model: nn.Module) -> dict[int, torch.device]:
    """Where every attention layer computes, by its index in the model."""
    return {
        index: computing_device(module, model)
        for module in model.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int)
    }


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are elsewhere (on the CPU or on disk) until they are needed."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def computing_device(module: nn.Module, model: nn.Module | None = None) -> torch.device:
    """Where a module computes; if it says nothing, where the first weight of `model` is that is anywhere."""
    for part in module.modules():
        for hook in _hooks(getattr(part, "_hf_hook", None)):
            place = getattr(hook, "execution_device", None)
            if place is not None:
                return torch.device(place)
    for weight in (*module.parameters(), *(() if model is None else model.parameters())):
        if not weight.is_meta:
            device: torch.device = weight.device
            return device
    return torch.device("cpu")


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook of accelerate, or those that it is made of."""
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
