# SPDX-License-Identifier: Apache-2.0
"""`headkv_mm.pipeline`: transformers' pipeline function with KV compression."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.registration import TASK, register

if TYPE_CHECKING:
    from transformers import Pipeline

    from headkv_mm.compression import Compression

SERVED = (TASK,)
_LOADING = ("revision", "token", "trust_remote_code", "device_map", "dtype")


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    kv_compression: str | Mapping[str, Any] | Compression | None = None,
    kv_budget: float | int | str | None = None,
    kv_options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Pipeline:
    """Make a pipeline that runs on a compressed KV cache.

    The arguments are those of `transformers.pipeline`, by name after the model. A task that is not served here goes to
    transformers unchanged, and asking for compression there is an error: it would be ignored.

    Args:
        task: "text-to-image", or any task of transformers without compression.
        model: folder, name or loaded model; the embedded model if None. Without a `dtype`, weights saved in half
            precision become float32 on the CPU.
        kv_compression: name of a method, such as "headkv"; see `headkv_mm.methods()`.
        kv_budget: share of the image's entries kept per KV head, entries per KV head, or bytes as text.
        kv_options: options of the method.
        **arguments: of `transformers.pipeline`, and of `TextToImagePipeline`.

    Returns:
        A `TextToImagePipeline`, or what transformers gives for the other tasks.

    Raises:
        ValueError: for compression on a task that is not served, bad compression arguments, or a model that cannot be
            loaded.
    """
    kv = KVArguments(kv_compression, kv_budget, kv_options or {})
    if task not in SERVED:
        import transformers

        if kv.given:
            raise ValueError(
                f"kv_compression is not served for the task {task!r}: it is served for {', '.join(SERVED)}. "
                "Use headkv_mm.compress(model, ...) around your own generate call instead"
            )
        return transformers.pipeline(task, model, **arguments)
    return _text_to_image(model, kv, arguments)


def _text_to_image(model: Any, kv: KVArguments, arguments: dict[str, Any]) -> Pipeline:
    import torch
    import transformers

    from headkv_mm.pipelines.loading import load_image_model
    from headkv_mm.pipelines.models import adapter_class_for
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

    kv.resolve()  # a wrong name should not wait for a model to load
    register()
    if model is None:
        from headkv_mm.demo import image_model_path

        model = image_model_path()
    as_saved = False
    if isinstance(model, str | os.PathLike):
        as_saved = arguments.get("dtype", "auto") == "auto" and "dtype" not in (arguments.get("model_kwargs") or {})
        folder = os.fspath(model)
        loading: dict[str, Any] = {"dtype": "auto", **(arguments.pop("model_kwargs", None) or {})}
        loading.update({name: arguments.pop(name) for name in _LOADING if name in arguments})
        model = load_image_model(folder, **loading)
        _add_processing(folder, adapter_class_for(model.config).needs_processor, arguments)
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a folder, a name or a transformers model, got {type(model).__name__}")
    if kv.given:
        arguments.update(kv_compression=kv.compression, kv_budget=kv.budget, kv_options=kv.options)
    arguments.setdefault("pipeline_class", TextToImagePipeline)
    pipe = transformers.pipeline(TASK, model, **arguments)
    if as_saved and pipe.device.type == "cpu" and pipe.model.dtype in (torch.float16, torch.bfloat16):
        pipe.model.float()  # half precision is slower there than float32, and less exact
    return pipe


def _add_processing(folder: str, needs_processor: bool, arguments: dict[str, Any]) -> None:
    """Name the model's folder as the place of its tokenizer or processor, unless the user gave one."""
    if needs_processor:
        arguments.setdefault("processor", folder)
    elif "tokenizer" not in arguments:
        from transformers import AutoTokenizer

        try:
            arguments["tokenizer"] = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError):
            return  # the adapter knows the tokenizer, or says what is missing
