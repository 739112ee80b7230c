# SPDX-License-Identifier: Apache-2.0
"""What the pipelines share whose stock `generate` writes text: their arguments, their checks, and their report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headkv_mm.attach import compress
from headkv_mm.pipelines.caches import stock_bytes
from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.text_reports import TextReport, merge_text_reports

if TYPE_CHECKING:
    import torch

    from headkv_mm.compression import Compression

_KV = ("kv_compression", "kv_budget", "kv_options")


class CompressedText:
    """Goes before a pipeline of transformers; `report` is of the latest call."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check that the model can be compressed as asked."""
        self._reports: list[TextReport] = []
        super().__init__(*args, **kwargs)
        self.model.eval()
        own: dict[str, Any] = getattr(self, "_forward_params", {})
        self._check(own.get("kv", KVArguments()))

    @property
    def report(self) -> TextReport | None:
        """Memory and time of the latest call."""
        return merge_text_reports(self._reports) if self._reports else None

    def _begin(self, parameters: dict[str, Any]) -> None:
        """A call begins: refuse what cannot work, and forget the report of the one before."""
        call = self._call_arguments(parameters)
        if call is not None:
            self._check(call)
        self._reports = []

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        kv = self._call_arguments(parameters)
        stock = {name: value for name, value in parameters.items() if name not in _KV and name != "kv"}
        preprocess, forward, postprocess = super()._sanitize_parameters(**stock)  # type: ignore[misc]
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
            with compress(self.model, compression, kind="text"):
                pass

    def _measured(
        self, kv: KVArguments, generate: Callable[[], Any], model_inputs: dict[str, Any], settings: dict[str, Any]
    ) -> Any:
        """Run the stock `generate` on the cache that was asked for, and report on it.

        Args:
            kv: the arguments.
            generate: gives a dict with "generated_sequence".
            model_inputs: what goes into the model; `input_ids` and the mask are read.
            settings: arguments of `generate`.
        """
        compression = kv.resolve()
        prompt, mask = model_inputs["input_ids"], model_inputs.get("attention_mask")
        prompt_tokens = int(mask.sum()) if mask is not None else prompt.numel()
        began = time.perf_counter()
        if compression.resolve().compresses:
            with compress(self.model, compression, kind="text") as session:
                output = generate()
            caches = list(session.caches)
        else:
            with _watched(self.model) as caches:
                output = generate()
        sequences = output["generated_sequence"]
        sequences = sequences.reshape(-1, sequences.shape[-1]).cpu()  # [rows, T]; also waits for the device
        seconds = time.perf_counter() - began
        width = prompt.shape[-1]
        if not sequences[0, :width].equal(prompt[0].cpu()):
            width = 0  # some models give back what is new only
        tokens = _new_tokens(sequences[:, width:], self._ends(settings))
        self._reports.append(_report(compression, caches, len(sequences), prompt_tokens, tokens, seconds))
        return output

    def _ends(self, settings: dict[str, Any]) -> list[int]:
        """Tokens that end a sequence."""
        configs = (settings.get("generation_config"), self.model.generation_config)
        found = settings.get("eos_token_id")
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
