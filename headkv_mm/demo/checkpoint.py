# SPDX-License-Identifier: Apache-2.0
"""Saves and restores a training run of an embedded model without pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_HEADER = "progress"


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer], progress: dict[str, Any]
) -> None:
    """Write weights, optimiser states and progress to one safetensors file, atomically.

    Args:
        path: file to write.
        model: its state dict is saved under "model.".
        optimizers: by name; their per-parameter tensors are saved under "NAME.INDEX.KEY".
        progress: JSON data; kept in the file's header.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(
        # Copies, because tied weights share their memory, which safetensors refuses.
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        temporary,
        metadata={_HEADER: json.dumps(progress)},
    )
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote.

    Returns:
        The progress.

    Raises:
        ValueError: if the file is no such checkpoint or belongs to another model.
    """
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_HEADER)
        if header is None:
            raise ValueError(f"{path} is no training checkpoint: its header has no progress")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another model: {error}") from error
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == name:
                index, _, field = rest.partition(".")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    progress: dict[str, Any] = json.loads(header)
    return progress
