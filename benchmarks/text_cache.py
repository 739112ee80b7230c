#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What selection costs at the end of a long prompt, and what a cache holds during a long answer; random weights.

`prefill` alternates the stock cache and the compressed one on the same prompt: their logits must be equal bit for bit,
because the prompt's attention is the stock one, and the difference in time is the price of selection. `decode` forces
tokens at a fixed number of entries per head, against the growing full cache, and notes the bytes held at every step.

Example:
    python benchmarks/text_cache.py prefill --tokens 8192 --method adakv --budget 0.25
    python benchmarks/text_cache.py decode --tokens 4000 --method snapkv --budget 256
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache
from headkv_mm.budgets import parse_budget
from headkv_mm.commands.versions import versions
from headkv_mm.kernels import cpu


def build(layers: int, heads: int, kv_heads: int, head_dim: int, positions: int) -> LlamaForCausalLM:
    """A Llama of the given size with random weights."""
    torch.manual_seed(0)
    hidden = heads * head_dim
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=(hidden * 8 // 3 + 255) // 256 * 256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def forward(model: LlamaForCausalLM, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, float]:
    """Logits of the last token, and CPU seconds of this process."""
    began = time.process_time()
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return logits, time.process_time() - began


def prefill(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """Selection at the end of a prompt.

    Raises:
        SystemExit: if the compressed cache changes the prompt's logits.
    """
    ids = torch.randint(1024, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    report = None
    for number in tqdm(range(args.rounds), desc="rounds"):
        stock = DynamicCache(config=model.config)
        cache = HeadKVCache(model, args.method, budget=parse_budget(args.budget))
        runs = [("stock", stock), ("ours", cache)]
        outputs = {}
        for name, held in runs if number % 2 == 0 else runs[::-1]:
            outputs[name], spent = forward(model, ids, held)
            seconds[name].append(spent)
        if not torch.equal(outputs["stock"], outputs["ours"]):
            raise SystemExit("gate failed: the compressed cache changed the logits of its prompt")
        report = cache.report()
    assert report is not None
    ratios = [ours / stock for ours, stock in zip(seconds["ours"], seconds["stock"], strict=True)]
    return {
        "cpu_seconds": seconds,
        "overhead": statistics.median(ratios) - 1,
        "overheads": [ratio - 1 for ratio in ratios],
        "nbytes": report.nbytes,
        "nbytes_peak": report.nbytes_peak,
        "nbytes_full": report.nbytes_full,
        "ratio": report.ratio,
    }


def decode(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """A long answer.

    Raises:
        SystemExit: if the logits differ before anything was evicted, or the bytes grow.
    """
    budget = parse_budget(args.budget)
    forced = torch.randint(1024, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    spent: dict[str, list[float]] = {"stock": [], "ours": []}
    held: list[int] = []
    stock, cache = DynamicCache(config=model.config), HeadKVCache(model, args.method, budget=budget)
    worst, first_eviction = 0.0, None
    for step in tqdm(range(args.tokens), desc="tokens"):
        token = forced[:, step : step + 1]
        outputs = {}
        for name, past in (("stock", stock), ("ours", cache)):
            outputs[name], seconds = forward(model, token, past)
            spent[name].append(seconds)
        held.append(cache.nbytes)
        lengths = int(cache.compressed_layers[0].store.length.max())
        if first_eviction is None and lengths <= step:
            first_eviction = step
        if first_eviction is None:
            difference = (outputs["stock"] - outputs["ours"]).abs().max() / outputs["stock"].abs().max()
            worst = max(worst, float(difference))
    if worst > 1e-4:
        raise SystemExit(f"gate failed: logits differ by {worst:.2e} of their size before anything was evicted")
    settled = held[(first_eviction or 0) + 256 :]
    if len(set(settled)) > 2:  # with and without the queries that wait for the next decision
        raise SystemExit(f"gate failed: the bytes held vary: {sorted(set(settled))}")
    last = args.tokens // 4
    return {
        "first_eviction": first_eviction,
        "nbytes": sorted(set(settled)),
        "nbytes_full": cache.nbytes_full,
        "ratio": cache.nbytes / cache.nbytes_full,
        "cpu_seconds": {name: sum(values) for name, values in spent.items()},
        "speed_up": sum(spent["stock"]) / sum(spent["ours"]),
        "speed_up_last_quarter": sum(spent["stock"][-last:]) / sum(spent["ours"][-last:]),
    }


def main() -> None:
    """Parse, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode"))
    parser.add_argument("--method", default="adakv")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt, or of the answer (default 8192)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of the prefill; the median is reported (default 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.warm_up()
    model = build(args.layers, args.heads, args.kv_heads, args.head_dim, args.tokens)
    result = {
        "benchmark": f"text_cache {args.what}",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "gate": "passed",
        "result": (prefill if args.what == "prefill" else decode)(model, args),
        "versions": versions(),
    }
    print(json.dumps(result["result"], indent=1))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
