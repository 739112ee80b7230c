# SPDX-License-Identifier: Apache-2.0
"""Adds the task "text-to-image" to transformers, so that `transformers.pipeline` knows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TASK = "text-to-image"


class TextToImageTask(Mapping[str, Any]):
    """Our entry in transformers' table of tasks.

    Class, models and default are looked up when they are asked for: the pipeline class needs `transformers.pipelines`
    complete, and a missing default model must not harm the other tasks.
    """

    def __getitem__(self, key: str) -> Any:
        """The entry's part: "impl", "pt", "default" or "type"."""
        if key == "impl":
            from headkv_mm.pipelines.text_to_image import TextToImagePipeline

            return TextToImagePipeline
        if key == "pt":
            from transformers import AutoModelForMultimodalLM

            return (AutoModelForMultimodalLM,)
        if key == "default":
            from headkv_mm.demo import image_model_path

            return {"model": (str(image_model_path()), "main")}
        if key == "type":
            return "multimodal"
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("impl", "pt", "default", "type"))

    def __len__(self) -> int:
        return 4

    def copy(self) -> dict[str, Any]:
        """A plain dict with every part."""
        return dict(self)


def register() -> bool:
    """Add our task to the table of transformers.

    The entry is written directly: `register_pipeline` would mark the class as custom code, and a saved pipeline could
    then only be loaded with `trust_remote_code=True`.

    Returns:
        Whether "text-to-image" is ours. A task of that name that somebody else has registered stays as it is;
        `headkv_mm.pipeline` works all the same.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    from headkv_mm.llamagen import register as register_llamagen

    register_llamagen()  # the default model must load
    tasks = PIPELINE_REGISTRY.supported_tasks
    return isinstance(tasks.setdefault(TASK, TextToImageTask()), TextToImageTask)
