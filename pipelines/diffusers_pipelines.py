# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines with an autoregressive stage: recognising, loading and taking them apart."""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.loading import first_line, load_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model_index.json"
_SERVED = "GlmImagePipeline"
_MODEL = "vision_language_encoder"


def is_diffusers_pipeline(model: Any) -> bool:
    """Whether an object is a pipeline of diffusers, told without importing it."""
    return any(base.__name__ == "DiffusionPipeline" for base in type(model).__mro__)


def is_diffusers_folder(name: str, **hub: Any) -> bool:
    """Whether a folder, or a model on the hub, holds a diffusers pipeline.

    Args:
        name: folder or name.
        **hub: revision and token.
    """
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, _INDEX))
    if os.path.exists(name) or os.path.isabs(name) or name.startswith(".") or name.count(os.sep) > 1:
        return False
    # Every other model on the hub has a config.json, which is needed anyway.
    return _hub_file(name, "config.json", hub) is None and _hub_file(name, _INDEX, hub) is not None


def load_diffusers_pipeline(name: str, **load_arguments: Any) -> Any:
    """Load a diffusers pipeline with an autoregressive stage.

    Args:
        name: a diffusers folder, or the name of a model on the hub.
        **load_arguments: for `from_pretrained`: dtype (by default float32 without a GPU, else as saved), device_map of
            the autoregressive stage, revision, token.

    Raises:
        ValueError: if the pipeline is of another class, or a part of it cannot be read.
        ImportError: if diffusers is not installed.
    """
    import torch

    hub: dict[str, Any] = {key: load_arguments.pop(key) for key in ("revision", "token") if key in load_arguments}
    _check_class(name, hub)
    try:
        from diffusers import GlmImagePipeline
    except ImportError as error:
        raise ImportError(f"{name} needs diffusers 0.37 or newer: pip install 'diffusers>=0.37'") from error
    from transformers import GlmImageForConditionalGeneration

    if load_arguments.get("dtype", "auto") == "auto" and not torch.cuda.is_available():
        load_arguments["dtype"] = torch.float32  # half precision is slower on the CPU, and less exact
    model = None
    skipped: dict[str, Any] = {}
    if os.path.isdir(name):  # loaded apart, complete to the last tensor: diffusers would only warn
        model = load_complete(os.path.join(name, _MODEL), GlmImageForConditionalGeneration, None, load_arguments)
        skipped[_MODEL] = None
    dtype = load_arguments["dtype"] if model is None else model.dtype
    if dtype == "auto":
        dtype = torch.bfloat16  # as the published model is saved
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call it dtype, older ones know only this
            pipeline = GlmImagePipeline.from_pretrained(name, torch_dtype=dtype, **skipped, **hub)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"the diffusers folder {name} cannot be read: {first_line(error)}") from error
    if model is not None:
        pipeline.register_modules(**{_MODEL: model})
    return pipeline


def model_of(pipeline: Any, arguments: dict[str, Any]) -> PreTrainedModel:
    """The transformers model of a diffusers pipeline; what it draws with goes to `arguments`, unless given.

    Raises:
        ValueError: if the pipeline has no autoregressive stage that is served.
    """
    if type(pipeline).__name__ != _SERVED:
        _refuse(type(pipeline).__name__)
    for name, value in (("processor", pipeline.processor), ("image_decoder", pipeline)):
        if arguments.get(name) is None:
            arguments[name] = value
    model: PreTrainedModel = pipeline.vision_language_encoder
    return model


def _check_class(name: str, hub: dict[str, Any]) -> None:
    path = os.path.join(name, _INDEX) if os.path.isdir(name) else _hub_file(name, _INDEX, hub)
    try:
        with open(str(path), encoding="utf-8") as file:
            found = json.load(file).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{name}/{_INDEX} cannot be read: {first_line(error)}") from error
    if found != _SERVED:
        _refuse(str(found), f"{name} is a diffusers folder of the class")


def _refuse(name: str, what: str = "the diffusers pipeline") -> None:
    raise ValueError(
        f"{what} {name} has no autoregressive stage that is served here, so it has no KV cache to compress: "
        f"of diffusers' pipelines {_SERVED} is served"
    )


def _hub_file(name: str, file: str, hub: dict[str, Any]) -> str | None:
    """Path of a file of a model on the hub; None if it has none, or cannot be reached."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
    except OSError:
        return None
    return None if found is None else str(found)
