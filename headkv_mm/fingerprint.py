# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a model: two models with the same one compute the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

_CONFIG = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)
_SAMPLED = 64
"""Numbers taken from every tensor."""


def fingerprint(model: Any) -> str:
    """Hash the shape of a model and a sample of every weight, in float32.

    Half-precision weights give the same fingerprint as their float32 copies; training a single step changes it. Of a
    model that is divided among processes all of them must ask: every weight is put together for a moment.

    Args:
        model: a transformers model.

    Returns:
        16 hexadecimal digits.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    stated = {name: config.get(name) for name in _CONFIG}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = _whole(_loaded(model, name, weight).detach()).flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _loaded(model: Any, name: str, weight: Tensor) -> Tensor:
    """A weight that accelerate may have moved out of the model, to memory or disk, until it is needed."""
    if not weight.is_meta:
        return weight
    owner, _, own_name = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    maps = [getattr(part, "weights_map", None) for part in (hook, *getattr(hook, "hooks", ()))]
    stored = next((found for found in maps if found is not None), None)
    if stored is None:
        raise ValueError(f"the weight {name} has no values: load the model before it is used")
    found: Tensor = stored[own_name]
    return found


def _whole(weight: Tensor) -> Tensor:
    """A weight that may be divided among processes."""
    gathered: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return gathered
