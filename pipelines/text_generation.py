# SPDX-License-Identifier: Apache-2.0
"""The text-generation pipeline of transformers on a compressed KV cache."""

from __future__ import annotations

from typing import Any

from transformers.pipelines.text_generation import TextGenerationPipeline

from headkv_mm.pipelines.compressed_text import CompressedText
from headkv_mm.pipelines.kv_arguments import KVArguments


class KVTextGenerationPipeline(CompressedText, TextGenerationPipeline):
    """transformers' text-generation pipeline whose `generate` runs on a compressed KV cache.

    Everything goes in and comes out as with the stock pipeline: text or chats, lists, batches, datasets, streamers,
    `num_return_sequences`, beams. These arguments are new; each may be given when the pipeline is made and again with
    a call, which then goes first.

    Args of a call:
        kv_compression: name of a method, a dict, or a `Compression`; "none" or None for the full cache.
        kv_budget: share of the tokens seen that a KV head keeps on the average (0 to 1), entries per KV head (int), or
            bytes of the whole cache ("512MiB").
        kv_options: dict of options of the method.

    Attributes:
        report: a `TextReport` of the latest call, all its batches together; None before the first. After a call with a
            generator or dataset it covers what was taken from the iterator so far.

    Raises:
        ValueError: for an unknown method or option, a budget out of range, or a model that cannot be compressed.
    """

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        """Complete prompts or chats; see the class."""
        if isinstance(text_inputs, list | tuple) and not text_inputs:
            raise ValueError("got an empty list of prompts: give at least one")
        self._begin(kwargs)
        return super().__call__(text_inputs, **kwargs)

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> Any:
        kv = generate_kwargs.pop("kv", KVArguments())
        stock = super()._forward  # a bare super() does not work inside a function of its own
        return self._measured(kv, lambda: stock(model_inputs, **generate_kwargs), model_inputs, generate_kwargs)
