# SPDX-License-Identifier: Apache-2.0
"""`headkv_mm.pipeline`: transformers' pipeline function with KV compression."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.registration import LONG_DOCUMENT_QA, TASK, register

if TYPE_CHECKING:
    from transformers import Pipeline

    from headkv_mm.compression import Compression

TEXT_GENERATION = "text-generation"
IMAGE_TEXT_TO_TEXT = "image-text-to-text"
SERVED = (TASK, TEXT_GENERATION, LONG_DOCUMENT_QA, IMAGE_TEXT_TO_TEXT)
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
        task: "text-to-image", "text-generation", "long-document-question-answering", "image-text-to-text", or any task
            of transformers without compression.
        model: folder, name or loaded model; the embedded model if None, of tasks that have one. For images also a
            diffusers folder or pipeline whose image tokens an autoregressive model writes. Without a `dtype`, weights
            saved in half precision become float32 on the CPU.
        kv_compression: name of a method, such as "headkv"; see `headkv_mm.methods()`. "none" for the full cache.
        kv_budget: share of the entries kept per KV head (of the image's, or of the tokens seen), entries per KV head,
            or bytes as text.
        kv_options: options of the method.
        **arguments: of `transformers.pipeline`, and of the pipeline of the task.

    Returns:
        A `TextToImagePipeline`, `KVTextGenerationPipeline`, `LongDocumentQAPipeline` or `KVImageTextToTextPipeline`, or
        what transformers gives for the other tasks.

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
    if task == TASK:
        return _text_to_image(model, kv, arguments)
    return _vision(model, kv, arguments) if task == IMAGE_TEXT_TO_TEXT else _text(task, model, kv, arguments)


def _text_to_image(model: Any, kv: KVArguments, arguments: dict[str, Any]) -> Pipeline:
    from headkv_mm.pipelines import diffusers_pipelines as diffusers
    from headkv_mm.pipelines.loading import load_image_model
    from headkv_mm.pipelines.models import adapter_class_for
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

    kv.resolve()  # a wrong name should not wait for a model to load
    register()
    if model is None:
        from headkv_mm.demo import image_model_path

        model = image_model_path()
    as_saved = _is_as_saved(model, arguments)
    if isinstance(model, str | os.PathLike):
        folder = os.fspath(model)
        loading = _loading(arguments)
        if diffusers.is_diffusers_folder(folder, **_hub(loading)):
            model = diffusers.load_diffusers_pipeline(folder, **loading)
        else:
            model = load_image_model(folder, **loading)
            _add_processing(folder, adapter_class_for(model.config).needs_processor, arguments, _hub(loading))
    if diffusers.is_diffusers_pipeline(model):
        model = diffusers.model_of(model, arguments)
    arguments.setdefault("pipeline_class", TextToImagePipeline)
    return _assemble(TASK, model, kv, arguments, widen=as_saved)


def _text(task: str, model: Any, kv: KVArguments, arguments: dict[str, Any]) -> Pipeline:
    from headkv_mm.pipelines.loading import load_text_model, load_tokenizer

    if kv.compression is not None or task == TEXT_GENERATION:  # question answering has a default compression
        kv.resolve()  # a wrong name should not wait for a model to load
    register()
    if model is None:
        from headkv_mm.demo import text_model_path

        model = text_model_path()
    as_saved = _is_as_saved(model, arguments)
    if isinstance(model, str | os.PathLike):
        folder, loading = os.fspath(model), _loading(arguments)
        model = load_text_model(folder, **loading)
        if arguments.get("tokenizer") is None:
            arguments["tokenizer"] = load_tokenizer(folder, **_hub(loading))
    pipeline_class: type[Pipeline]
    if task == TEXT_GENERATION:
        from headkv_mm.pipelines.text_generation import KVTextGenerationPipeline as pipeline_class
    else:
        from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline as pipeline_class
    arguments.setdefault("pipeline_class", pipeline_class)
    return _assemble(task, model, kv, arguments, widen=as_saved)


def _vision(model: Any, kv: KVArguments, arguments: dict[str, Any]) -> Pipeline:
    from headkv_mm.pipelines.image_text_to_text import KVImageTextToTextPipeline
    from headkv_mm.pipelines.loading import load_processor, load_vision_model

    kv.resolve()  # a wrong name should not wait for a model to load
    if model is None:
        raise ValueError(f"{IMAGE_TEXT_TO_TEXT} has no embedded model: give model=, a folder, a name or a loaded model")
    as_saved = _is_as_saved(model, arguments)
    if isinstance(model, str | os.PathLike):
        folder, loading = os.fspath(model), _loading(arguments)
        model = load_vision_model(folder, **loading)
        if arguments.get("processor") is None:
            arguments["processor"] = load_processor(folder, **_hub(loading))
    arguments.setdefault("pipeline_class", KVImageTextToTextPipeline)
    return _assemble(IMAGE_TEXT_TO_TEXT, model, kv, arguments, widen=as_saved)


def _is_as_saved(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the model comes from a folder in whatever precision it was saved."""
    given = arguments.get("dtype", "auto") != "auto" or "dtype" in (arguments.get("model_kwargs") or {})
    return isinstance(model, str | os.PathLike) and not given


def _loading(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take what is for `from_pretrained` out of the arguments."""
    loading: dict[str, Any] = {"dtype": "auto", **(arguments.pop("model_kwargs", None) or {})}
    loading.update({name: arguments.pop(name) for name in _LOADING if name in arguments})
    return loading


def _hub(loading: dict[str, Any]) -> dict[str, Any]:
    """What of it says where on the hub things lie."""
    return {name: loading[name] for name in ("revision", "token", "trust_remote_code") if name in loading}


def _assemble(task: str, model: Any, kv: KVArguments, arguments: dict[str, Any], *, widen: bool) -> Pipeline:
    """The pipeline around a loaded model; `widen` makes half precision float32 on the CPU."""
    import torch
    import transformers

    from headkv_mm.devices import is_offloaded

    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a folder, a name or a transformers model, got {type(model).__name__}")
    if arguments.get("device_map") is not None:
        raise ValueError(
            "device_map says where to load a model, and this one is loaded already: load it with "
            "from_pretrained(..., device_map=...), or give its folder"
        )
    _place(model, arguments.get("device"))
    # An explicit None would ask for the full cache.
    said = {"kv_compression": kv.compression, "kv_budget": kv.budget, "kv_options": dict(kv.options) or None}
    arguments.update({name: value for name, value in said.items() if value is not None})
    pipe = transformers.pipeline(task, model, **arguments)
    half = pipe.model.dtype in (torch.float16, torch.bfloat16)
    # Offloaded weights come from where they are in the precision that they have.
    if widen and half and pipe.device.type == "cpu" and not is_offloaded(model):
        pipe.model.float()  # half precision is slower there than float32, and less exact
    return pipe


def _place(model: Any, device: Any) -> None:
    """Move a model where it was asked for: among several processes transformers leaves it where it was loaded.

    A model that a device map or tensor parallelism has placed stays as it is.
    """
    import torch

    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    placed = getattr(model, "hf_device_map", None) is not None or (getattr(model, "_tp_size", None) or 1) > 1
    if device is None or not known or placed:
        return
    if isinstance(device, int) and device < 0:
        device = "cpu"
    model.to(torch.device(device))


def _add_processing(folder: str, needs_processor: bool, arguments: dict[str, Any], hub: dict[str, Any]) -> None:
    """Load the tokenizer or the processor of the model's folder, unless the user gave one."""
    if needs_processor:
        if arguments.get("processor") is None and arguments.get("tokenizer") is None:
            from headkv_mm.pipelines.loading import load_processor

            arguments["processor"] = load_processor(folder, **hub)
    elif "tokenizer" not in arguments:
        from transformers import AutoTokenizer

        try:
            arguments["tokenizer"] = AutoTokenizer.from_pretrained(folder, **hub)
        except (OSError, ValueError, KeyError, ImportError):
            return  # the adapter knows the tokenizer, or says what is missing
