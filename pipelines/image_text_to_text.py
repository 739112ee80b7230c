# SPDX-License-Identifier: Apache-2.0
"""The image-text-to-text pipeline of transformers on a compressed KV cache."""

from __future__ import annotations

from typing import Any

from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from headkv_mm.pipelines.compressed_text import CompressedText
from headkv_mm.pipelines.kv_arguments import KVArguments


class KVImageTextToTextPipeline(CompressedText, ImageTextToTextPipeline):
    """transformers' image-text-to-text pipeline whose `generate` runs on a compressed KV cache.

    The image's tokens are part of the prompt and are compressed with it. Everything goes in and comes out as with the
    stock pipeline. These arguments are new; each may be given when the pipeline is made and again with a call, which
    then goes first.

    Args of a call:
        kv_compression: name of a method that serves texts, a dict, or a `Compression`; "none" or None for the full
            cache.
        kv_budget: share of the tokens seen (of images and text alike) that a KV head keeps on the average (0 to 1),
            entries per KV head (int), or bytes of the whole cache ("512MiB").
        kv_options: dict of options of the method.

    Attributes:
        report: a `TextReport` of the latest call; None before the first.

    Raises:
        ValueError: for an unknown method or option, a budget out of range, a model that cannot be compressed, or a
            processor that reads no images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check that the processor reads images and the model can be compressed as asked."""
        super().__init__(*args, **kwargs)
        if getattr(self.processor, "image_processor", None) is None:
            raise ValueError(
                f"{type(self.processor).__name__} reads no images: pass processor=... with an image processor and a "
                "tokenizer, as AutoProcessor.from_pretrained gives it"
            )

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Answer about images; see the class."""
        self._begin(kwargs)
        return super().__call__(images, text, **kwargs)

    def _check(self, kv: KVArguments) -> None:
        if kv.resolve().resolve().compresses and self.model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(self.model).__name__} reads with an encoder of its own, so its prompt is not in the cache that "
                "would be compressed; use the stock cache"
            )
        super()._check(kv)

    def _forward(
        self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any] | None = None, kv: KVArguments | None = None
    ) -> Any:
        stock = super()._forward  # a bare super() does not work inside a function of its own
        return self._measured(
            kv or KVArguments(), lambda: stock(model_inputs, generate_kwargs), model_inputs, generate_kwargs or {}
        )
