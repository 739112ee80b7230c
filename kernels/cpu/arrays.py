# SPDX-License-Identifier: Apache-2.0
"""Torch tensors as numpy arrays over the same memory, in the form the compiled loops expect."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# Stand-ins for an optional argument: a compiled function has one signature, with or without the tensor.
NO_FLOATS = np.empty(0, np.float32)
NO_FLAGS = np.empty(0, np.bool_)
NO_INTS = np.empty(0, np.int32)

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def in_place(tensor: Tensor, name: str) -> Array:
    """The storage of `tensor` itself, for reading and writing; half types as their bits.

    Raises:
        ValueError: the tensor is not contiguous, so a write would have to go to a copy.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous because the kernel writes to it or addresses it by slot, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}: pass {name}.contiguous()"
        )
    return _view(tensor)


def readable(tensor: Tensor, dtype: torch.dtype) -> Array:
    """A contiguous array of `dtype` (half types as their bits) for reading; copies only what is not so already."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return _view(tensor.contiguous())


def _view(tensor: Tensor) -> Array:
    if tensor.requires_grad:
        tensor = tensor.detach()
    bits = _BITS.get(tensor.dtype)
    array: Array = (tensor if bits is None else tensor.view(bits)).numpy()
    return array


def floats(tensor: Tensor | None) -> Array:
    """`readable` in float32, or the stand-in."""
    return NO_FLOATS if tensor is None else readable(tensor, torch.float32)


def ints(tensor: Tensor) -> Array:
    """`readable` in int32."""
    return readable(tensor, torch.int32)
