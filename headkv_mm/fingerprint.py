# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a model: which weights made a result, a table or a saved cache."""

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
_WHOLE = 1 << 20
"""Numbers up to which a tensor counts whole."""
_SAMPLED = 1 << 16
"""Numbers taken from a larger one, evenly spread."""


def fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes and values of a model's weights and persistent buffers, the first 16 digits.

    Floating-point values count in float32, so half-precision weights have the fingerprint of their float32 copies;
    training a single step changes it. Of tensors of more than a million numbers an even sample is taken, so a model of
    billions costs no more than tens of megabytes to hash. Of a model that is divided among processes all of them must
    ask: every weight is put together for a moment.

    Args:
        model: a transformers model.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: if a weight has no values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):  # quantised modules may add other things
            values = _values(_whole(_loaded(model, name, tensor.detach())))
            digest.update(f"{name} {values.dtype} {tuple(tensor.shape)}".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def stated_config(model: Any) -> dict[str, Any]:
    """What a model's configuration says about its attention, as JSON types: the same weights can be read in two ways.

    Args:
        model: a transformers model.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    stated: dict[str, Any] = json.loads(json.dumps({name: config.get(name) for name in _CONFIG}, default=str))
    return stated


def _values(tensor: Tensor) -> Tensor:
    """The numbers that count, on the CPU."""
    flat = tensor.flatten()
    if flat.numel() > _WHOLE:
        # An odd step: one that divides the width would meet the same few columns in every row.
        flat = flat[:: flat.numel() // _SAMPLED | 1]
    return (flat.float() if flat.dtype.is_floating_point else flat).cpu().contiguous()


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
