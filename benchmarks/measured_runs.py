# SPDX-License-Identifier: Apache-2.0
"""Runs of `image_throughput.py`: seconds, memory, bytes of the cache, and what the time goes into."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_image_models import Bench
from transformers.cache_utils import DynamicLayer

from headkv_mm import HeadKVCache, kernels
from headkv_mm.compressor import LayerCompressor
from headkv_mm.pipelines.models.base import GeneratedTokens
from headkv_mm.workload import memory_needed


@dataclass
class Clock:
    """Adds up seconds in functions; waits for the device before and after each."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            began = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, attention, appending to a stock cache, and a compressed layer's step are timed."""
        watched = [
            (kernels, "append_decode", "attention"),
            (torch.nn.functional, "scaled_dot_product_attention", "attention"),
            (DynamicLayer, "update", "append"),
            (LayerCompressor, "decode", "layer"),
        ]
        plain = [getattr(owner, name) for owner, name, _ in watched]
        for (owner, name, label), function in zip(watched, plain, strict=True):
            setattr(owner, name, self.wrap(label, function))
        try:
            yield
        finally:
            for (owner, name, _), function in zip(watched, plain, strict=True):
                setattr(owner, name, function)


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> int | None:
    """Forget the peak of memory; returns bytes used now, or None where that cannot be known."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
        return _resident("VmRSS")
    except OSError:
        return None


def peak_memory(device: str) -> int | None:
    """Peak bytes since `reset_peak`."""
    return int(torch.cuda.max_memory_allocated()) if device.startswith("cuda") else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def cache_bytes(caches: list[Any], batch: int, bench: Bench) -> int:
    """Bytes at the end of a run; a loop that gives its cache not away has allocated one of full length."""
    if not caches:
        work = bench.shape.workload(dtype=bench.model.dtype, weights=0)
        layers = bench.model.config.get_text_config(decoder=True).num_hidden_layers
        of_all = work.config.get_text_config(decoder=True).num_hidden_layers
        return memory_needed(work, "none", batch=batch).cache_full * layers // of_all
    found = 0
    for cache in caches:
        if isinstance(cache, HeadKVCache):
            found += cache.nbytes
        else:
            found += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return found


def once(bench: Bench, batch: int, function: Callable[[], GeneratedTokens], device: str) -> dict[str, Any]:
    """One run: seconds, memory, bytes, tokens; on the CPU, where it costs nothing, also the shares of the time."""
    base = reset_peak(device)
    clock = None if device.startswith("cuda") else Clock(device)
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    with nullcontext() if clock is None else clock.watching():
        made = function()
    wait(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_memory(device) if base is not None else None
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "parts": None if clock is None else shares(clock.seconds, wall),
        "peak_above_weights": None if peak is None or base is None else peak - base,
        "cache_bytes": cache_bytes(made.caches, batch, bench),
        "tokens": made.tokens.cpu(),
    }


def parts(function: Callable[[], GeneratedTokens], device: str) -> dict[str, float]:
    """Shares of the time of one more run, for devices that must be waited for to know."""
    clock = Clock(device)
    wait(device)
    began = time.perf_counter()
    with clock.watching():
        function()
    wait(device)
    return shares(clock.seconds, time.perf_counter() - began)


def shares(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Attention, what the cache does besides, and the rest (the model's matrices)."""
    attention = seconds.get("attention", 0.0)
    # A compressed layer's step contains its attention; its prompt's attention is outside and very small.
    besides = max(seconds.get("layer", 0.0) - attention, 0.0) if "layer" in seconds else seconds.get("append", 0.0)
    return {"attention": attention / whole, "cache": besides / whole, "rest": 1 - (attention + besides) / whole}
