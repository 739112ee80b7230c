# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a ragged cache against dense attention over the full one, on the CPU.

One step is one token: for every layer, `append_decode` (write the new entry, attend over what the heads kept) against
torch's `scaled_dot_product_attention` over the full length (which is spared the write, and gets the query heads of a
group as the rows of one query, which is its fastest way: no key is read twice). The two take turns, so that a busy
machine disturbs both. Decoding is bound by memory, so the ratio of the bytes read is what one can hope for.

The same call is first compared with the float64 reference. Without agreement nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headkv_mm import kernels
from headkv_mm.kernels import reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
EXAMPLE = """example:
  python benchmarks/ragged_decode.py --threads 1
  python benchmarks/ragged_decode.py --rows 64 --tokens 2304 --dtype bfloat16 --json output/ragged_decode.json

5 % of a context of 16,384 tokens, at the shape of an 8B model:
  python benchmarks/ragged_decode.py --batch 1 --rows 8 --group 4 --head-size 128 --tokens 16384 --layers 16 \\
      --distributions equal --keep 0.05 --threads 1"""


@dataclass
class Layer:
    """Storage of one layer. One slot of every region is free for the entry that a step appends."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor

    def double(self) -> Layer:
        """A copy in float64."""
        ints = (tensor.clone() for tensor in (self.positions, self.start, self.length))
        return Layer(self.keys.double(), self.values.double(), *ints)


def draw_lengths(
    distribution: str, shape: tuple[int, int], tokens: int, keep: float, generator: torch.Generator
) -> Tensor:
    """Lengths after the step.

    "equal": a share `keep` of the tokens everywhere. "uniform": in 5 .. 100 % of them. "skewed": one head in five keeps
    all, and the rest few.
    """
    if distribution == "equal":
        return torch.full(shape, max(1, int(tokens * keep)))
    if distribution == "uniform":
        return torch.randint(tokens // 20, tokens + 1, shape, generator=generator)
    few = torch.randint(tokens // 30, tokens // 10, shape, generator=generator)
    return few.where(torch.rand(shape, generator=generator) >= 0.2, torch.tensor(tokens))


def build_layer(lengths: Tensor, size: int, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """Random entries for lengths [B, G] that include the free slot."""
    flat = lengths.flatten()
    slots = int(flat.sum())
    keys, values = (torch.randn(slots, size, generator=generator).to(dtype) for _ in range(2))
    start = (flat.cumsum(0) - flat).view_as(lengths).int()
    return Layer(keys, values, torch.arange(slots, dtype=torch.int32), start, lengths.int() - 1)


class Problem:
    """The layers of one distribution, and the two ways to decode one token over them."""

    def __init__(self, distribution: str, options: argparse.Namespace) -> None:
        self.dtype = DTYPES[options.dtype]
        generator = torch.Generator().manual_seed(options.seed)
        batch, size, tokens = options.batch, options.head_size, options.tokens
        shape = (batch, options.rows // batch)
        lengths = [draw_lengths(distribution, shape, tokens, options.keep, generator) for _ in range(options.layers)]
        self.layers = [build_layer(n, size, self.dtype, generator) for n in lengths]
        self.full = [
            torch.randn(2, *shape, tokens, size, generator=generator).to(self.dtype) for _ in range(options.layers)
        ]
        self.query = torch.randn(batch, shape[1] * options.group, size, generator=generator).to(self.dtype)
        self.new_keys, self.new_values = (torch.randn(*shape, size, generator=generator).to(self.dtype) for _ in "kv")
        self.positions = torch.full((batch,), tokens, dtype=torch.int32)
        self.scale = size**-0.5
        self.byte_ratio = options.layers * options.rows * tokens / sum(int(n.sum()) for n in lengths)

    def ours(self) -> None:
        """One token, all layers."""
        for layer in self.layers:
            kernels.append_decode(
                self.query,
                self.new_keys,
                self.new_values,
                self.positions,
                layer.keys,
                layer.values,
                layer.positions,
                layer.start,
                layer.length,
                scale=self.scale,
            )

    def take_back(self) -> None:
        """Forget the entries that a step appended, so that every step has the same work."""
        for layer in self.layers:
            layer.length.sub_(1)

    def dense(self) -> None:
        """One token, all layers, over the full length."""
        batch, heads, _, size = self.full[0][0].shape
        query = self.query.view(batch, heads, -1, size)  # [B, G, R, D]
        for keys, values in self.full:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=self.scale)

    def decode(self, layer: Layer, backend: Any, dtype: torch.dtype) -> Tensor:
        """One layer's step, and back."""
        entry = (self.new_keys.to(dtype), self.new_values.to(dtype), self.positions)
        storage = (layer.keys, layer.values, layer.positions, layer.start, layer.length)
        out: Tensor = backend.append_decode(self.query.to(dtype), *entry, *storage, scale=self.scale)
        layer.length.sub_(1)
        return out

    def check(self) -> float:
        """Largest error of the timed call against the float64 reference, over all layers."""
        worst = 0.0
        for layer in self.layers:
            expected = self.decode(layer.double(), reference, torch.float64)
            error = (self.decode(layer, kernels, self.dtype).double() - expected).abs() / (1 + expected.abs())
            worst = max(worst, float(error.max()))  # a NaN would make this comparison false, so it is looked for
            if not bool(error.isfinite().all()):
                return float("inf")
        return worst


def measure(
    steps: dict[str, Callable[[], None]], repeats: int, between: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Median milliseconds per step, wall and processor time of the process, taking turns. `between` is not timed."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            sample = (time.perf_counter() - wall, time.process_time() - cpu)
            if repeat >= 2:  # the first rounds fill caches and wake threads
                samples[name].append(sample)
        between()
    return {
        name: {
            "wall_ms": 1e3 * statistics.median(wall for wall, _ in taken),
            "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in taken),
        }
        for name, taken in samples.items()
    }


def run_distribution(distribution: str, options: argparse.Namespace) -> dict[str, Any]:
    """Check, then time one distribution.

    Raises:
        SystemExit: the kernels disagree with the reference.
    """
    problem = Problem(distribution, options)
    error = problem.check()
    limit = TOLERANCE[problem.dtype]
    if error > limit:
        raise SystemExit(
            f"{distribution}: the {kernels.backend_for(problem.query)} kernel is off by {error:.1e} from the float64 "
            f"reference ({limit:.0e} allowed), so no speed-up is reported"
        )
    times = measure({"ours": problem.ours, "dense": problem.dense}, options.repeats, problem.take_back)
    speedup = {clock: times["dense"][f"{clock}_ms"] / times["ours"][f"{clock}_ms"] for clock in ("wall", "cpu")}
    return {
        "distribution": distribution,
        "largest_error": error,
        "byte_ratio": problem.byte_ratio,
        **{f"{name}_{clock}": value for name, clocks in times.items() for clock, value in clocks.items()},
        **{f"speedup_{clock}": value for clock, value in speedup.items()},
        **{f"share_of_byte_ratio_{clock}": value / problem.byte_ratio for clock, value in speedup.items()},
    }


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import numba

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "commit": commit.stdout.strip() or None,
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24, help="layers per token (default %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="(default %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=32, help="regions per layer, batch x KV heads (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=600, help="length of the full cache (default %(default)s)")
    parser.add_argument("--head-size", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--group", type=int, default=1, help="query heads per KV head (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each (default %(default)s)")
    parser.add_argument(
        "--distributions", nargs="+", choices=("uniform", "skewed", "equal"), default=["uniform", "skewed"]
    )
    parser.add_argument("--keep", type=float, default=0.05, help='share kept by "equal" (default %(default)s)')
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    for name, least in (
        ("layers", 1),
        ("batch", 1),
        ("rows", 1),
        ("tokens", 30),
        ("group", 1),
        ("threads", 1),
        ("repeats", 1),
    ):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.rows % options.batch:
        parser.error(f"--rows must be a multiple of --batch ({options.batch}), got {options.rows}")
    if not 0 < options.keep <= 1:
        parser.error(f"--keep must be above 0 and at most 1, got {options.keep}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    results = [run_distribution(distribution, options) for distribution in options.distributions]
    print(f"{machine['cpu']}, {options.threads} thread(s), torch {machine['torch']}, numba {machine['numba']}")
    print(
        f"{options.layers} layers x {options.rows} rows x up to {options.tokens} tokens, D={options.head_size}, "
        f"R={options.group}, {options.dtype}; medians of {options.repeats} steps; error against float64 checked"
    )
    print(f"{'lengths':10}{'clock':8}{'dense ms':>10}{'ours ms':>10}{'speed-up':>10}{'bytes':>8}{'share':>8}")
    for result in results:
        for clock in ("cpu", "wall"):
            print(
                f"{result['distribution']:10}{clock:8}{result[f'dense_{clock}_ms']:10.2f}{result[f'ours_{clock}_ms']:10.2f}"
                f"{result[f'speedup_{clock}']:9.2f}x{result['byte_ratio']:7.2f}x"
                f"{100 * result[f'share_of_byte_ratio_{clock}']:7.0f}%"
            )
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "distributions")}
        write_json(options.json, {"machine": machine, "settings": settings, "results": results})
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
