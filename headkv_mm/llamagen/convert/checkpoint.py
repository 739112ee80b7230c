# SPDX-License-Identifier: Apache-2.0
"""Reading a published checkpoint without running anything that lies in it."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

_INNER = ("model", "module", "state_dict", "ema")
"""Where training scripts put the weights, in the order in which the published sampler looks for them."""
_PREFIXES = ("module.", "_orig_mod.")


class Checkpoint:
    """Named tensors, each of which must be taken exactly once.

    Args:
        path: for messages.
        tensors: by their published names.
    """

    def __init__(self, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = dict(tensors)
        self.left_out: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def names(self) -> list[str]:
        """Names of the tensors that were not taken yet."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: if there is none of this name.
        """
        return tuple(self._find(name).shape)

    def take(self, name: str) -> torch.Tensor:
        """A tensor, which is then gone from here.

        Raises:
            ValueError: if there is none of this name.
        """
        found = self._find(name)
        del self._tensors[name]
        return found

    def leave_out(self, name: str) -> None:
        """Drop a tensor that only training needs, if it is there."""
        if self._tensors.pop(name, None) is not None:
            self.left_out.append(name)

    def finish(self) -> None:
        """Refuse a checkpoint with tensors that nobody took.

        Raises:
            ValueError: naming the first one.
        """
        if self._tensors:
            others = f" (and {len(self) - 1} more)" if len(self) > 1 else ""
            raise ValueError(
                f"{self.path} holds {self.names[0]}{others}, which has no place in this kind of model: nothing was "
                "converted"
            )

    def _find(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name}: is it a checkpoint of this kind?")
        return self._tensors[name]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, or a torch file that holds nothing but tensors and plain containers.

    Args:
        path: the file. The weights may lie at its top or under "model", "module", "state_dict" or "ema".

    Raises:
        ValueError: if it is no such file, holds pickled code, or no tensors.
        OSError: if it cannot be read.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name} is a folder: give the checkpoint file")
    with open(name, "rb"):
        pass  # a missing file is said as such
    content = _read_safetensors(name) if name.endswith(".safetensors") else _read_torch(name)
    tensors = _tensors(content)
    if not tensors:
        raise ValueError(f"{name} holds no weights: expected named tensors, or those under {', '.join(_INNER)}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return Checkpoint(name, tensors)


def _read_safetensors(name: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(name))
    except SafetensorError as error:
        raise ValueError(f"{name} is no readable safetensors file: {error}") from error


def _read_torch(name: str) -> Any:
    try:
        # Only the newer of torch's two formats can be mapped instead of read.
        return torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(name))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name} holds more than tensors and would have to run code to be read, so it was refused "
            f"({_culprit(error)}): save its weights as safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name} is no readable torch checkpoint: {(str(error).splitlines() or ['damaged'])[0]}"
        ) from error


def _culprit(error: Exception) -> str:
    """What torch refused to load."""
    for part in str(error).replace("\n", " ").split(". "):
        if "GLOBAL" in part or "global" in part:
            words = [word.strip("`'\",.:") for word in part.split()]
            dotted = [word for word in words if "." in word and not word.startswith(("torch.", "http"))]
            if dotted:
                return dotted[0]
    return "pickled objects"


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """The named tensors at the top of what a file holds, or under one of the known names."""
    for found in (content, *(content.get(key) for key in _INNER if isinstance(content, Mapping))):
        if isinstance(found, Mapping) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
            return {str(key): value for key, value in found.items()}
    return {}
