#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What every method for text costs and saves: CPU time of a long prompt and of an answer, and bytes; random weights.

The stock cache and the methods alternate in one process: each method's time is divided by the mean of the two stock
runs around it. Methods with tables get random ones, which cost what real ones cost. Before anything is timed, a budget
of 100 % must give the logits of the stock cache bit for bit, on a shorter prompt and some tokens after it.

Example:
    python benchmarks/method_times.py --tokens 4096 --answer 128 --budget 0.25
    python benchmarks/method_times.py --methods snapkv,adakv,laprox
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from text_cache import build, forward
from tqdm import tqdm
from transformers import DynamicCache, LlamaForCausalLM

from headkv_mm import HeadKVCache
from headkv_mm.budgets import Budget, parse_budget
from headkv_mm.commands.versions import versions
from headkv_mm.kernels import cpu
from headkv_mm.registry import methods

CHECKED = 8
"""The gate runs on an eighth of the tokens."""
BETWEEN = 2
"""Methods between two runs of the stock cache."""


def tables(layers: int, heads: int, kv_heads: int) -> dict[str, dict[str, Any]]:
    """Options of the methods that need tables: random scores, and a gate that leaves nothing out."""
    draw = torch.Generator().manual_seed(0)

    def scores(count: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row) for row in (torch.rand(layers, count, generator=draw) + 0.1).tolist())

    return {
        "headkv-r2": {"scores": scores(kv_heads)},
        "compresskv": {
            "head_scores": scores(heads),
            "layer_errors": tuple(torch.rand(layers, generator=draw).add(0.1).tolist()),
        },
        "compilerkv": {"head_weights": scores(kv_heads), "gate": tuple(((0.0, 0.0),) for _ in range(layers))},
    }


class Bench:
    """One model, one prompt, one forced answer.

    Args:
        model: a random model.
        args: of the command line.
    """

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace) -> None:
        self.model, self.budget = model, parse_budget(args.budget)
        draw = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(1024, (1, args.tokens), generator=draw)
        self.answer = torch.randint(1024, (1, args.answer), generator=draw)
        self.options = tables(args.layers, args.heads, args.kv_heads)

    def cache(self, method: str, budget: Budget) -> Any:
        """An empty cache; "none" is the stock one."""
        if method == "none":
            return DynamicCache(config=self.model.config)
        return HeadKVCache(self.model, method, budget=budget, **self.options.get(method, {}))

    def run(self, cache: Any, prompt: torch.Tensor, answer: torch.Tensor) -> tuple[list[torch.Tensor], float, float]:
        """Logits of the last token of the prompt and of every token after it; CPU seconds of both parts."""
        first, prefill = forward(self.model, prompt, cache)
        logits, decode = [first], 0.0
        for token in answer.split(1, dim=1):
            more, seconds = forward(self.model, token, cache)
            logits.append(more)
            decode += seconds
        return logits, prefill, decode

    def check(self, method: str) -> None:
        """The gate.

        Raises:
            SystemExit: if a budget of 100 % changes a logit.
        """
        prompt, answer = self.prompt[:, : self.prompt.shape[1] // CHECKED], self.answer[:, :16]
        stock, ours = (self.run(self.cache(name, 1.0), prompt, answer)[0] for name in ("none", method))
        if not all(map(torch.equal, stock, ours)):
            raise SystemExit(f"gate failed: {method} with a budget of 100 % changes the logits of the stock cache")

    def time(self, method: str) -> dict[str, Any]:
        """One run: CPU seconds, and for a compressed cache the bytes at its end."""
        cache = self.cache(method, self.budget)
        _, prefill, decode = self.run(cache, self.prompt, self.answer)
        if method == "none":
            return {"prefill": prefill, "decode": decode}
        held = {name: getattr(cache, name) for name in ("nbytes", "nbytes_peak", "nbytes_full")}
        return {"prefill": prefill, "decode": decode, **held}


def measure(bench: Bench, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Time all methods.

    Returns:
        For each its CPU time as a share of the stock cache's, medians over the rounds; bytes; and the seconds.
    """
    for name in tqdm(names, desc="gate"):
        bench.check(name)
    ratios: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in names}
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=rounds * len(names), desc="runs") as bar:
        for number in range(rounds):
            order = names if number % 2 == 0 else names[::-1]
            before = bench.time("none")
            for first in range(0, len(order), BETWEEN):
                group = {name: bench.time(name) for name in order[first : first + BETWEEN]}
                after = bench.time("none")
                for name, run in group.items():
                    for part, values in ratios[name].items():
                        values.append(2 * run[part] / (before[part] + after[part]))
                    found[name] = run
                    bar.update()
                before = after
    return [
        {
            "method": name,
            **{f"{part}_ratio": statistics.median(values) for part, values in ratios[name].items()},
            **{f"{part}_ratios": values for part, values in ratios[name].items()},
            **{part: found[name][part] for part in ("nbytes", "nbytes_peak", "nbytes_full")},
            "seconds_of_last_round": {part: found[name][part] for part in ("prefill", "decode")},
        }
        for name in names
    ]


def main() -> None:
    """Parse, measure, print, and write JSON if asked."""
    every = [name for name in methods("text") if name != "none"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(every), help="separated by commas (default: all for text)")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt (default 4096)")
    parser.add_argument("--answer", type=int, default=128, help="decoded tokens (default 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="medians are reported (default 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := sorted(set(args.methods) - set(every)):
        parser.error(f"there is no method {', '.join(unknown)} for text; there are {', '.join(every)}")
    torch.set_num_threads(args.threads)
    cpu.warm_up()
    model = build(args.layers, args.heads, args.kv_heads, args.head_dim, args.tokens + args.answer)
    result = {
        "benchmark": "method_times",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "gate": "passed",
        "results": measure(Bench(model, args), args.methods, args.rounds),
        "versions": versions(),
    }
    for run in result["results"]:
        held = run["nbytes"] / run["nbytes_full"]
        print(
            f"{run['method']:20} prefill {run['prefill_ratio']:.3f}  decode {run['decode_ratio']:.3f}  held {held:.3f}"
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
