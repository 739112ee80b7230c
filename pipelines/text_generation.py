# SPDX-License-Identifier: Apache-2.0
"""The text-generation pipeline of transformers on a compressed KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.pipelines.text_generation import TextGenerationPipeline

from headkv_mm.attach import compress
from headkv_mm.pipelines.caches import stock_bytes
from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.text_reports import TextReport, merge_text_reports

if TYPE_CHECKING:
    import torch

    from headkv_mm.compression import Compression

_KV = ("kv_compression", "kv_budget", "kv_options")


class KVTextGenerationPipeline(TextGenerationPipeline):
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check that the model can be compressed as asked."""
        self._reports: list[TextReport] = []
        super().__init__(*args, **kwargs)
        self.model.eval()
        self._check(self._forward_params.get("kv", KVArguments()))

    @property
    def report(self) -> TextReport | None:
        """Memory and time of the latest call."""
        return merge_text_reports(self._reports) if self._reports else None

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        """Complete prompts or chats; see the class."""
        if isinstance(text_inputs, list | tuple) and not text_inputs:
            raise ValueError("got an empty list of prompts: give at least one")
        call = self._call_arguments(kwargs)
        if call is not None:
            self._check(call)
        self._reports = []
        return super().__call__(text_inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        kv = self._call_arguments(parameters)
        stock = {name: value for name, value in parameters.items() if name not in _KV and name != "kv"}
        preprocess, forward, postprocess = super()._sanitize_parameters(**stock)
        return preprocess, forward if kv is None else {**forward, "kv": kv}, postprocess

    def _call_arguments(self, parameters: dict[str, Any]) -> KVArguments | None:
        """What the arguments say about the cache on top of the pipeline's own; None if they say nothing."""
        call = KVArguments.of(parameters)
        if not call.given:
            return parameters.get("kv")
        own: dict[str, Any] = getattr(self, "_forward_params", {})  # not there yet while the pipeline is made
        settings: KVArguments = own.get("kv", KVArguments())
        return settings.overridden_by(call)

    def _check(self, kv: KVArguments) -> None:
        """Refuse what cannot work before anything runs."""
        compression = kv.resolve()
        if compression.resolve().compresses:
            with compress(self.model, compression):
                pass

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> Any:
        compression = generate_kwargs.pop("kv", KVArguments()).resolve()
        prompt, mask = model_inputs["input_ids"], model_inputs.get("attention_mask")
        prompt_tokens = int(mask.sum()) if mask is not None else prompt.numel()
        began = time.perf_counter()
        if compression.resolve().compresses:
            with compress(self.model, compression) as session:
                output = super()._forward(model_inputs, **generate_kwargs)
            caches = list(session.caches)
        else:
            with _watched(self.model) as caches:
                output = super()._forward(model_inputs, **generate_kwargs)
        sequences = output["generated_sequence"].flatten(0, 1).cpu()  # [rows, T]; also waits for the device
        seconds = time.perf_counter() - began
        tokens = _new_tokens(sequences[:, prompt.shape[-1] :], self._ends(generate_kwargs))
        self._reports.append(_report(compression, caches, len(sequences), prompt_tokens, tokens, seconds))
        return output

    def _ends(self, generate_kwargs: dict[str, Any]) -> list[int]:
        """Tokens that end a sequence."""
        configs = (generate_kwargs.get("generation_config"), self.model.generation_config)
        found = generate_kwargs.get("eos_token_id")
        for config in configs:
            found = getattr(config, "eos_token_id", None) if found is None else found
        return [] if found is None else found if isinstance(found, list) else [int(found)]


def _report(
    compression: Compression, caches: list[Any], rows: int, prompt_tokens: int, tokens: int, seconds: float
) -> TextReport:
    """The report of one run, whose caches are still full."""
    compresses = compression.resolve().compresses
    reports = tuple(cache.report() for cache in caches) if compresses else ()
    stock = 0 if compresses else sum(stock_bytes(cache) for cache in caches)
    return TextReport(
        method=compression.method,
        budget=compression.budget if compresses else None,
        options=compression.kwargs,
        nbytes=stock + sum(report.nbytes for report in reports),
        nbytes_peak=stock + sum(report.nbytes_peak for report in reports),
        nbytes_full=stock + sum(report.nbytes_full for report in reports),
        rows=rows,
        runs=1,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        seconds=seconds,
        caches=reports,
    )


@contextmanager
def _watched(model: torch.nn.Module) -> Iterator[list[Any]]:
    """While the context lasts, the list holds the cache of the model's latest forward."""
    seen: list[Any] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            seen[:] = [cache]

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _new_tokens(rows: torch.Tensor, ends: list[int]) -> int:
    """Tokens of int64 [B, T] up to the first end of each row, the end included."""
    import torch

    if not ends:
        return rows.numel()
    ended = torch.isin(rows, torch.tensor(ends, dtype=rows.dtype))
    return int((ended.long().cumsum(-1) - ended.long() == 0).sum())
