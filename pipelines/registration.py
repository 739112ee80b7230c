# SPDX-License-Identifier: Apache-2.0
"""Adds our tasks to transformers, so that `transformers.pipeline` knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

TASK = "text-to-image"
LONG_DOCUMENT_QA = "long-document-question-answering"
_PARTS = ("impl", "pt", "default", "type")


class _Task(Mapping[str, Any]):
    """An entry of ours in transformers' table of tasks.

    Class, models and default are looked up when they are asked for: the pipeline class needs `transformers.pipelines`
    complete, and a missing default model must not harm the other tasks.
    """

    def _part(self, key: str) -> Any:
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        """The entry's part: "impl", "pt", "default" or "type"."""
        if key not in _PARTS:
            raise KeyError(key)
        return self._part(key)

    def __iter__(self) -> Iterator[str]:
        return iter(_PARTS)

    def __len__(self) -> int:
        return len(_PARTS)

    def copy(self) -> dict[str, Any]:
        """A plain dict with every part."""
        return dict(self)


class TextToImageTask(_Task):
    """The entry for images."""

    def _part(self, key: str) -> Any:
        if key == "impl":
            from headkv_mm.pipelines.text_to_image import TextToImagePipeline

            return TextToImagePipeline
        if key == "pt":
            from transformers import AutoModelForMultimodalLM

            return (AutoModelForMultimodalLM,)
        if key == "default":
            from headkv_mm.demo import image_model_path

            return {"model": (str(image_model_path()), "main")}
        return "multimodal"


class LongDocumentQATask(_Task):
    """The entry for questions about long documents."""

    def _part(self, key: str) -> Any:
        if key == "impl":
            from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline

            return LongDocumentQAPipeline
        if key == "pt":
            from transformers import AutoModelForCausalLM

            return (AutoModelForCausalLM,)
        if key == "default":
            from headkv_mm.demo import text_model_path

            return {"model": (str(text_model_path()), "main")}
        return "text"


def register() -> bool:
    """Add our tasks to the table of transformers.

    The entries are written directly: `register_pipeline` would mark the classes as custom code, and a saved pipeline
    could then only be loaded with `trust_remote_code=True`.

    Returns:
        Whether the tasks are ours. A task of one of these names that somebody else has registered stays as it is;
        `headkv_mm.pipeline` works all the same.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    from headkv_mm.llamagen import register as register_llamagen

    register_llamagen()  # the default model must load
    tasks = PIPELINE_REGISTRY.supported_tasks
    entries: dict[str, Callable[[], _Task]] = {TASK: TextToImageTask, LONG_DOCUMENT_QA: LongDocumentQATask}
    found = [isinstance(tasks.setdefault(name, entry()), entry) for name, entry in entries.items()]  # type: ignore[arg-type]
    return all(found)
