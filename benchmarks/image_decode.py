#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A whole image with a compressed cache against the same image with the full one, random weights.

Two runs over the same model, prompts and seeds: the full cache (transformers' own), then the method. Before anything is
timed, a gate checks on the same code that both give the same logits as long as nothing was evicted, and that the bytes
are those of the budget. What the method costs besides attention (scores, head types, eviction, counting) is measured
inside the run.

Example:
    python benchmarks/image_decode.py --batch 16 --grid 32 --budget 1/6 --json benchmarks/results/cpu/image_decode.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from headkv_mm import HeadKVCache, kernels, plan_memory
from headkv_mm.budgets import parse_budget
from headkv_mm.commands.versions import versions
from headkv_mm.compressor import LayerCompressor
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration


def build(
    grid: int, layers: int, heads: int, head_dim: int, prompt: int, codebook: int
) -> LlamaGenForConditionalGeneration:
    """A LlamaGen of the given size with random weights."""
    torch.manual_seed(0)
    hidden = heads * head_dim
    text = {
        "vocab_size": codebook + 8,
        "hidden_size": hidden,
        "intermediate_size": (hidden * 8 // 3 + 255) // 256 * 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": prompt + grid * grid,
    }
    config = LlamaGenConfig(
        text_config=text,
        image_height=grid,
        image_width=grid,
        codebook_size=codebook,
        max_prompt_length=prompt,
        patch_size=None,
        pad_token_id=codebook,
        bos_token_id=codebook + 1,
        boi_token_id=codebook + 2,
        null_token_id=codebook + 3,
    )
    return LlamaGenForConditionalGeneration(config).eval()


class Clock:
    """Adds up the time spent in functions that it replaces."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return timed


def gate(model: LlamaGenForConditionalGeneration, method: str, budget: Any) -> None:
    """Refuse to time code that is wrong: same logits before the first eviction, bytes as budgeted.

    Raises:
        SystemExit: if either fails.
    """
    grid, prompt = model.config.image_width, model.config.max_prompt_length
    ids = torch.full((2, prompt), model.config.bos_token_id)
    codes = torch.randint(model.config.codebook_size, (2, grid * 4), generator=torch.Generator().manual_seed(0))
    stock, ours = DynamicCache(config=model.config.get_text_config()), HeadKVCache(model, method, budget=budget)
    worst = 0.0
    with torch.no_grad():
        for step in range(codes.shape[1]):
            inputs = ids if step == 0 else codes[:, step - 1 : step]
            a, b = (model(input_ids=inputs, past_key_values=cache, logits_to_keep=1).logits for cache in (stock, ours))
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    if worst > 1e-4:
        raise SystemExit(f"gate failed: logits differ by {worst:.2e} of their size before anything was evicted")


def run(
    model: LlamaGenForConditionalGeneration, batch: int, cache: Any, seeds: list[int], label: str
) -> tuple[float, float]:
    """One batch of images with guidance. Returns (wall seconds, CPU seconds)."""
    prompt = model.config.max_prompt_length
    ids = torch.full((batch, prompt), model.config.bos_token_id)
    wall, cpu = time.perf_counter(), time.process_time()
    with tqdm(total=model.config.num_image_tokens, desc=label, unit="token") as bar:
        model.generate(
            ids,
            torch.ones_like(ids),
            guidance_scale=2.0,
            seeds=seeds,
            past_key_values=cache,
            callback=lambda done, total: bar.update(),
        )
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they say."""
    torch.set_num_threads(args.threads)
    model = build(args.grid, args.layers, args.heads, args.head_dim, args.prompt, args.codebook)
    budget = parse_budget(args.budget)
    gate(model, args.method, budget)
    rounds: list[dict[str, float]] = []
    held: dict[str, int] = {}
    for number in range(args.rounds):
        seeds = list(range(number * args.batch, (number + 1) * args.batch))
        full_wall, full_cpu = run(
            model, args.batch, DynamicCache(config=model.config.get_text_config()), seeds, "full cache"
        )
        cache, clock = HeadKVCache(model, args.method, budget=budget), Clock()
        plain_attend, plain_decode = kernels.append_decode, LayerCompressor.decode
        kernels.append_decode = clock.wrap("attention", plain_attend)
        LayerCompressor.decode = clock.wrap("decode", plain_decode)  # type: ignore[method-assign]
        try:
            wall, cpu = run(model, args.batch, cache, seeds, args.method)
        finally:
            kernels.append_decode = plain_attend
            LayerCompressor.decode = plain_decode  # type: ignore[method-assign]
        overhead = clock.seconds["decode"] - clock.seconds["attention"]
        rounds.append(
            {
                "full_seconds": full_wall,
                "full_cpu_seconds": full_cpu,
                "seconds": wall,
                "cpu_seconds": cpu,
                "attention_share": clock.seconds["attention"] / wall,
                "overhead_share": overhead / wall,
            }
        )
        report = cache.report()
        stored = sum(layer.store.keys.nbytes + layer.store.values.nbytes for layer in cache.compressed_layers)
        plan = plan_memory(model, args.method, budget=budget, rows=2 * args.batch, condition=0, dtype=torch.float32)
        held = {
            "keys_values": stored,
            "bookkeeping": report.nbytes - stored,
            "nbytes": report.nbytes,
            "nbytes_peak": report.nbytes_peak,
            "nbytes_full": report.nbytes_full,
            "planned_without_prompt": plan.nbytes,
        }
    middle = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    return {
        "benchmark": "image_decode",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "gate": "passed",
        "bytes": {
            **held,
            "ratio": held["nbytes"] / held["nbytes_full"],
            "bookkeeping_share": held["bookkeeping"] / held["keys_values"],
        },
        "median": {
            **middle,
            "speed_up": middle["full_seconds"] / middle["seconds"],
            "cpu_speed_up": middle["full_cpu_seconds"] / middle["cpu_seconds"],
        },
        "rounds": rounds,
        "versions": versions(),
    }


def main() -> None:
    """Parse, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="headkv")
    parser.add_argument("--budget", default="1/6")
    parser.add_argument("--batch", type=int, default=16, help="images; guidance doubles the rows (default 16)")
    parser.add_argument("--grid", type=int, default=32, help="tokens per side (default 32: 1024 tokens)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens (default 16)")
    parser.add_argument("--codebook", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; medians are reported (default 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    result = measure(args)
    median, held = result["median"], result["bytes"]
    full, ours = median["full_seconds"], median["seconds"]
    full_cpu, ours_cpu = median["full_cpu_seconds"], median["cpu_seconds"]
    print(f"full cache {full:.1f} s, {args.method} {ours:.1f} s: {median['speed_up']:.2f}x")
    print(f"CPU seconds {full_cpu:.1f} against {ours_cpu:.1f}: {median['cpu_speed_up']:.2f}x")
    print(f"bytes {held['nbytes']:,} of {held['nbytes_full']:,}, {held['ratio']:.3f} of them")
    print(f"bookkeeping {held['bookkeeping_share']:.2%} of keys and values")
    print(
        f"attention {median['attention_share']:.1%} of the run, the rest of the method {median['overhead_share']:.2%}"
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
