# SPDX-License-Identifier: Apache-2.0
"""What `headkv-mm plan` plans for: a shape, a folder, a configuration file or a model of the hub; never its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headkv_mm.image_grid import ImageGrid
from headkv_mm.shapes import Shape, get_shape, shapes

_LIKE = {"chameleon": "lumina-mgpt-768", "emu3": "emu3", "glm_image": "glm-image", "janus": "janus-pro-7b"}
"""Model type -> the shape whose image is assumed where a configuration states none."""
_PIPELINE_FILE, _PIPELINE_MODEL = "model_index.json", "vision_language_encoder"
"""A diffusers folder, and the folder of its autoregressive model."""


@dataclass(frozen=True)
class PlannedModel:
    """A configuration and how its model is used.

    Attributes:
        title: for people.
        config: the configuration.
        grid: where the image lies; None for a text.
        guided: two rows per image.
        condition: prompt tokens that are assumed.
        notes: what was assumed and not stated by the model.
    """

    title: str
    config: Any
    grid: ImageGrid | None
    guided: bool
    condition: int
    notes: tuple[str, ...] = ()


def planned_model(name: str, *, size: tuple[int, int] | None = None, text: bool = False) -> PlannedModel:
    """Find what `name` means.

    Args:
        name: a shape, a folder, a configuration file, or a hub id.
        size: image tokens, height and width, in place of the model's own.
        text: plan a text, also with a model that can draw.

    Raises:
        ValueError: if there is no such model, or it has no image of that size.
    """
    shape = None if Path(name).exists() else shapes().get(name.lower())
    if shape is not None:
        return _of_shape(shape, size, text)
    config = _read_config(name)
    like = _LIKE.get(config.model_type)
    own = ImageGrid.from_config(config)
    usual = get_shape(like) if like is not None else None
    grid = None if text else own or (usual.grid if usual is not None else None)
    notes = []
    if grid is not None and own is None and usual is not None and size is None:
        notes.append(f"the configuration states no image size: that of {usual.title} is assumed, see --grid")
    condition = 0
    if grid is not None:
        condition = getattr(config, "max_prompt_length", None) or (usual.condition if usual is not None else 64)
    guided = grid is not None and (usual.guided if usual is not None else True)
    title = f"{name} ({type(config).__name__.removesuffix('Config')})"
    return PlannedModel(title, config, _resized(grid, size), guided, condition, tuple(notes))


def _of_shape(shape: Shape, size: tuple[int, int] | None, text: bool) -> PlannedModel:
    notes = (f"not confirmed: {shape.unconfirmed}",) if shape.unconfirmed else ()
    grid = None if text else _resized(shape.grid, size)
    return PlannedModel(shape.title, shape.config(), grid, shape.guided and not text, shape.condition, notes)


def _resized(grid: ImageGrid | None, size: tuple[int, int] | None) -> ImageGrid | None:
    """The same kind of grid in another size: newline tokens and a preview stay."""
    if size is None:
        return grid
    if grid is None:
        return ImageGrid(*size)
    height, width = size
    return ImageGrid(height, width, row_stride=width + grid.row_stride - grid.width, start=grid.start)


def _read_config(name: str) -> Any:
    """A configuration without its weights.

    Raises:
        ValueError: in one line, what is wrong.
    """
    from transformers import AutoConfig

    import headkv_mm.llamagen.registration  # noqa: F401 (LlamaGen's configuration is known to transformers then)

    path = Path(name)
    if path.is_dir():
        if (path / _PIPELINE_FILE).is_file():
            path = path / _PIPELINE_MODEL
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{path.parent} holds no config.json: give a model's folder")
    elif not path.exists() and "/" not in name:
        raise ValueError(f"there is no file, folder or shape {name!r}; see headkv-mm plan --list")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}") from None
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no configuration could be read from {name!r}: {reason}") from None


def dtype_of(name: str | None) -> torch.dtype | None:
    """A floating-point dtype by its name.

    Raises:
        ValueError: for another name.
    """
    if name is None:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype {name!r} is not understood: write float32, bfloat16 or float16")
    return found
