#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Images of a published model's shape, random weights: full cache in two loops, and methods at several budgets.

Baselines: `own loop` is the loop that comes with the model and the cache it allocates (a static cache of full length
for LlamaGen and Janus); `full` is our loop with transformers' growing cache. All runs alternate in one process and
draw greedily. Before anything is timed a gate checks, on one layer of the model, that a budget of everything gives the
tokens of the full cache, and that compressed attention gives its numbers as long as nothing was evicted.

Example:
    python benchmarks/image_throughput.py --shape llamagen-b-256 --batch 2 8
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_runs import once, parts
from random_image_models import Bench, build, gate
from tqdm import tqdm

from headkv_mm import Compression
from headkv_mm.budgets import parse_budget
from headkv_mm.commands.versions import versions
from headkv_mm.pipelines.models.base import GeneratedTokens
from headkv_mm.planned_model import dtype_of
from headkv_mm.shapes import get_shape
from headkv_mm.workload import memory_needed

OWN_LOOP, FULL = "own loop", "full"
Variant = tuple[str, str, Callable[[], GeneratedTokens]]
"""Method, budget, and a run."""


def variants(bench: Bench, batch: int, methods: list[str], budgets: list[str]) -> list[Variant]:
    """Everything that is compared."""

    def ours(compression: Compression) -> Callable[[], GeneratedTokens]:
        return lambda: bench.ours(batch, compression)

    own = bench.own(batch)
    found: list[Variant] = [] if own is None else [(OWN_LOOP, "", own)]
    found.append((FULL, "", ours(Compression("none"))))
    found += [
        (method, budget, ours(Compression(method, budget=parse_budget(budget))))
        for method in methods
        for budget in budgets
    ]
    return found


def measure(bench: Bench, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """All variants at one batch size."""
    chosen = variants(bench, batch, args.methods, args.budgets)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {(method, budget): [] for method, budget, _ in chosen}
    with tqdm(total=args.rounds * len(chosen), desc=f"batch {batch}", unit="run") as bar:
        for number in range(args.rounds):
            for method, budget, function in chosen if number % 2 == 0 else chosen[::-1]:
                runs[method, budget].append(once(bench, batch, function, args.device))
                bar.update()
    images = batch * bench.grid.tokens
    reference = runs[FULL, ""][0]
    condition = int(bench.prompts(batch).condition_lengths.max())
    results = []
    for method, budget, function in chosen:
        found = runs[method, budget]
        middle = {name: statistics.median(run[name] for run in found) for name in ("seconds", "cpu_seconds")}
        peaks = [run["peak_above_weights"] for run in found]
        full_seconds = {name: statistics.median(run[name] for run in runs[FULL, ""]) for name in middle}
        result: dict[str, Any] = {
            "method": method,
            "budget": budget,
            **middle,
            "tokens_per_second": images / middle["seconds"],
            "speed_up": full_seconds["seconds"] / middle["seconds"],
            "cpu_speed_up": full_seconds["cpu_seconds"] / middle["cpu_seconds"],
            "peak_above_weights": None if None in peaks else max(peaks),
            "cache_bytes": found[0]["cache_bytes"],
            "cache_ratio": found[0]["cache_bytes"] / reference["cache_bytes"],
            "same_tokens_as_full": float((found[0]["tokens"] == reference["tokens"]).float().mean()),
        }
        if (OWN_LOOP, "") in runs:
            for name, factor in (("seconds", "speed_up_over_own_loop"), ("cpu_seconds", "cpu_speed_up_over_own_loop")):
                result[factor] = statistics.median(run[name] for run in runs[OWN_LOOP, ""]) / middle[name]
        if method not in (OWN_LOOP, FULL) and args.layers is None:
            work = bench.shape.workload(
                dtype=bench.model.dtype, weights=0, guided=args.guidance != 1, condition=condition
            )
            plan = memory_needed(work, method, batch=batch, budget=parse_budget(budget))
            result["planned_cache_bytes"], result["planned_cache_peak"] = plan.cache_end, plan.cache
        if found[0]["parts"] is not None:
            result["parts"] = {
                name: statistics.median(run["parts"][name] for run in found) for name in found[0]["parts"]
            }
        elif args.parts:
            result["parts"] = parts(function, args.device)
        results.append(result)
    return {
        "batch": batch,
        "condition": condition,
        "rows": batch if args.guidance == 1 else 2 * batch,
        "results": results,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, check, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llamagen-b-256", help="see headkv-mm plan --list")
    parser.add_argument("--layers", type=int, help="blocks, to shorten the model (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="images together (default 2)")
    parser.add_argument("--guidance", type=float, default=3.0, help="1 for none; else two rows per image (default 3)")
    parser.add_argument("--methods", nargs="+", default=["headkv", "lines"])
    parser.add_argument("--budgets", nargs="+", default=["1/4", "1/6", "1/8"])
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; medians are reported (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-parts", dest="parts", action="store_false", help="no extra runs for shares of the time on a GPU"
    )
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = get_shape(args.shape)
    if shape.grid is None:
        parser.error(f"{args.shape} is a language model")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    dtype = dtype_of(args.dtype)
    assert dtype is not None
    compressions = [Compression(m, budget=parse_budget(b)) for m in args.methods for b in args.budgets]
    gate(build(shape, 1, args.device, dtype, args.guidance), compressions)
    bench = build(shape, args.layers, args.device, dtype, args.guidance)
    result: dict[str, Any] = {
        "benchmark": "image_throughput",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "shape": shape.title,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "grid": [bench.grid.height, bench.grid.width, bench.grid.row_stride],
        "layers": bench.model.config.get_text_config(decoder=True).num_hidden_layers,
        "gate": "passed",
        "batches": [],
        "versions": versions(),
    }
    for batch in args.batch:
        found = measure(bench, batch, args)
        result["batches"].append(found)
        for run in found["results"]:
            print(
                f"batch {batch:<4} {run['method']:<9} {run['budget']:<4} {run['seconds']:8.1f} s "
                f"{run['cpu_seconds']:8.1f} CPU s {run['tokens_per_second']:8.1f} tokens/s {run['speed_up']:6.2f}x "
                f"{run['cache_bytes'] / 2**20:9.1f} MiB"
            )
        if args.json is not None:  # after every batch size: the next one may be too much for the machine
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
