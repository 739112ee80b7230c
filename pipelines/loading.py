# SPDX-License-Identifier: Apache-2.0
"""Loading a model with every weight in its place, or a one-line error."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from headkv_mm.pipelines.models.base import ImageModelAdapter


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
    from transformers import AutoModelForMultimodalLM

    from headkv_mm.llamagen import register
    from headkv_mm.pipelines.models import adapter_class_for

    register()
    if os.path.isfile(os.path.join(os.fspath(folder), "model_index.json")):
        raise ValueError(f"{os.fspath(folder)} is a diffusers folder: load it with headkv_mm.pipeline(model=...)")
    return load_complete(os.fspath(folder), AutoModelForMultimodalLM, adapter_class_for, load_arguments)


def load_text_model(folder: str | os.PathLike[str], **load_arguments: Any) -> PreTrainedModel:
    """Load a language model that generates text.

    Args:
        folder: a transformers folder, or the name of a model on the hub.
        **load_arguments: for `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the configuration is of no language model, or the weights are unreadable, incomplete or of
            another model.
        OSError: if there is no such folder or model.
    """
    from transformers import AutoModelForCausalLM

    return load_complete(os.fspath(folder), AutoModelForCausalLM, None, load_arguments, foreign_allowed=True)


def load_vision_model(folder: str | os.PathLike[str], **load_arguments: Any) -> PreTrainedModel:
    """Load a model that answers about images.

    Args:
        folder: a transformers folder, or the name of a model on the hub.
        **load_arguments: for `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the configuration is of no such model, or the weights are unreadable, incomplete or of another
            model.
        OSError: if there is no such folder or model.
    """
    from transformers import AutoModelForImageTextToText

    return load_complete(os.fspath(folder), AutoModelForImageTextToText, None, load_arguments, foreign_allowed=True)


def load_tokenizer(folder: str | os.PathLike[str], **hub: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder.

    Args:
        folder: a transformers folder, or the name of a model on the hub.
        **hub: revision and token.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    name = os.fspath(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        # Where a folder has no vocabulary, some classes make a tokenizer of their special tokens alone.
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ValueError(
            f"{name} has no tokenizer that can be read ({first_line(error)}): put its tokenizer.json there, or pass "
            "tokenizer=..."
        ) from error


def load_processor(folder: str | os.PathLike[str], **hub: Any) -> ProcessorMixin:
    """Load the processor (tokenizer and image processor in one) of a model's folder.

    Args:
        folder: a transformers folder, or the name of a model on the hub.
        **hub: revision, token and trust_remote_code.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    from transformers import AutoProcessor, ProcessorMixin

    name = os.fspath(folder)
    advice = "put there what the processor's save_pretrained writes (tokenizer.json among it), or pass processor=..."
    try:
        processor = AutoProcessor.from_pretrained(name, **hub)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ValueError(f"{name} has no processor that can be read ({first_line(error)}): {advice}") from error
    if not isinstance(processor, ProcessorMixin):  # transformers falls back to the tokenizer alone
        raise ValueError(f"{name} has a {type(processor).__name__} but no processor: {advice}")
    return processor


def load_complete(
    name: str,
    auto_class: Any,
    check: Callable[[Any], type[ImageModelAdapter]] | None,
    load_arguments: dict[str, Any],
    *,
    foreign_allowed: bool = False,
) -> PreTrainedModel:
    """The model of a folder, complete; `check` gives its adapter, or refuses configurations that are not served.

    Published language models often carry tensors for other uses beside a complete model: `foreign_allowed`.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith(".") or name.count(os.sep) > 1):
        raise ValueError(f"{name}: no such folder")  # and no name of a model on the hub either
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file: give the folder with config.json and the weights")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} has no config.json: give a model folder as save_pretrained writes it")
    hub = {key: load_arguments[key] for key in ("revision", "token", "trust_remote_code") if key in load_arguments}
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the configuration of {name} cannot be read: {first_line(error)}") from error
    unused = () if check is None else check(config).unused_tensors
    try:
        model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True, **load_arguments)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the weights in {name} cannot be read: {first_line(error)}") from error
    missing = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
    foreign = sorted(key for key in map(str, info["unexpected_keys"]) if not key.startswith(unused))
    if missing or (foreign and not foreign_allowed):
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
