# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for sm_80 and sm_90 without a device, through the real launchers, and prints what it costs.

Launchers get meta tensors and a driver that only names a target, and launches stop after compilation. A launcher that
asks the device for a number fails on a meta tensor, so this also shows that none does. One JSON object per line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from headkv_mm.kernels import gpu

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NamedTarget:
    """The part of a driver that compilation asks for. The compiler caches by device index: one index per target."""

    def __init__(self, target: GPUTarget, index: int) -> None:
        self.target, self.index = target, index

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


compiled: list[tuple[str, Any]] = []
launch = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    compiled.append((self.__name__, kernel))
    return kernel


def resources(kernel: Any) -> dict[str, int]:
    """Registers and stack bytes (spills) per thread as the assembler reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return {"registers": int(found[1]), "stack": int(found[2])}


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def run_launchers(dtype: torch.dtype, size: int, group: int, *, decode_only: bool, options: bool) -> None:
    """Every launcher once; decode launchers on both sides of the chunk. `options`: softcap, sinks, first positions."""
    batch, groups, slots = 2, 4, 4096
    heads = groups * group
    query, keys, values = (
        meta(batch, heads, size, dtype=dtype),
        meta(slots, size, dtype=dtype),
        meta(slots, size, dtype=dtype),
    )
    positions, start, length = meta(slots), meta(batch, groups), meta(batch, groups)
    mass = meta(slots, dtype=torch.float32)
    new = (meta(batch, groups, size, dtype=dtype), meta(batch, groups, size, dtype=dtype), meta(batch))
    storage = (keys, values, positions, start, length)
    softcap, sinks = (30.0, meta(heads, dtype=torch.float32)) if options else (0.0, None)
    for max_length in (1000, 5000):
        gpu.append_decode(
            query, *new, *storage, scale=0.1, max_length=max_length, softcap=softcap, sinks=sinks, mass=mass
        )
        gpu.append_decode(
            query, *new, *storage,
            scale=0.1, max_length=max_length, softcap=softcap, sinks=sinks, mass=mass, mass_of="squared_logits",
        )  # fmt: skip
    gpu.ragged_decode(query, keys, values, start, length, scale=0.1, max_length=1000, softcap=softcap, sinks=sinks)
    if decode_only:
        return
    queries, query_positions = meta(batch, 32, heads, size, dtype=dtype), meta(batch, 32)
    first = meta(batch) if options else None
    gpu.head_mass(queries, query_positions, keys, positions, start, length, scale=0.1, tau=0.9, first_position=first)
    pooling = {"pool": 7, "pooling": "mean" if options else "max", "softcap": softcap, "sinks": sinks}
    gpu.window_scores(queries, query_positions, keys, positions, start, length, scale=0.1, **pooling)
    norms = meta(slots, heads // groups, dtype=torch.float32)
    gpu.window_norms(
        queries, query_positions, keys, positions, start, length, norms, scale=0.1, softcap=softcap, sinks=sinks
    )
    gpu.attention_behind(
        queries, query_positions, keys, positions, start, length, meta(batch),
        scale=0.1, power=2, first_position=first, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    gpu.mean_query_logits(meta(batch, heads, size, dtype=torch.float32), keys, start, length, scale=0.1)
    bounds = {"first": meta(batch, groups), "last": meta(batch, groups), "evict": meta(batch, groups)}
    victims = gpu.stratified_victims(mass, positions, start, length, **bounds, strata_ratio=0.5)
    gpu.fill_holes(victims, *storage, mass)
    for keep in (None, victims):
        gpu.gather_regions(meta(3, dtype=torch.int64), keep, *storage, *storage[:3], meta(3, groups), meta(3, groups))


def main() -> None:
    JITFunction.run = compile_only
    seen = set()
    for index, capability in enumerate((80, 90)):
        driver.set_active(NamedTarget(GPUTarget("cuda", capability, 32), index))
        for dtype, size, group, decode_only, options in (
            (torch.bfloat16, 128, 4, False, True),
            (torch.bfloat16, 64, 1, False, False),
            (torch.float16, 64, 4, True, False),
            (torch.float16, 128, 1, True, True),
            (torch.float32, 64, 1, True, True),
            (torch.float32, 128, 4, True, False),
        ):
            compiled.clear()
            run_launchers(dtype, size, group, decode_only=decode_only, options=options)
            for name, kernel in compiled:
                if (index, kernel.hash) in seen:
                    continue
                seen.add((index, kernel.hash))
                line = {
                    "target": f"sm_{capability}",
                    "kernel": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "head_size": size,
                    "group": group,
                    "shared": kernel.metadata.shared,
                    "asynchronous_copies": "cp.async" in kernel.asm["ptx"],
                    **resources(kernel),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
