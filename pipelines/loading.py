# SPDX-License-Identifier: Apache-2.0
"""Loading an image model with every weight in its place, or a one-line error."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_image_model(folder: str | os.PathLike[str], **load_arguments: Any) -> PreTrainedModel:
    """Load a model that an adapter can drive.

    Args:
        folder: a transformers folder, or the name of a model on the hub.
        **load_arguments: for `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the configuration is none we serve, or the weights are unreadable, incomplete or of another
            model.
        OSError: if there is no such folder or model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForMultimodalLM

    from headkv_mm.llamagen import register
    from headkv_mm.pipelines.models import adapter_class_for

    register()
    name = os.fspath(folder)
    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith(".") or name.count(os.sep) > 1):
        raise ValueError(f"{name}: no such folder")  # and no name of a model on the hub either
    if os.path.isfile(os.path.join(name, "model_index.json")):
        raise ValueError(f"{name} is a diffusers folder: its model has no adapter here yet")
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file: give the folder with config.json and the weights")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} has no config.json: give a model folder as save_pretrained writes it")
    hub = {key: load_arguments[key] for key in ("revision", "token", "trust_remote_code") if key in load_arguments}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the configuration of {name} cannot be read: {first_line(error)}") from error
    adapter_class_for(config)
    try:
        model, info = AutoModelForMultimodalLM.from_pretrained(
            name, config=config, output_loading_info=True, **load_arguments
        )
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the weights in {name} cannot be read: {first_line(error)}") from error
    missing = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    foreign = sorted(str(key) for key in info["unexpected_keys"])
    if missing or foreign:
        what = f"{len(missing)} tensors are missing or of another size" if missing else ""
        more = f"{len(foreign)} belong to another model" if foreign else ""
        raise ValueError(
            f"the weights in {name} do not fit its config.json: {' and '.join(filter(None, (what, more)))} "
            f"(first: {(missing + foreign)[0]})"
        )
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
