#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long the model reads a long prompt if only chosen tokens go on after half of its layers; random weights.

The stock cache and `fastkv` alternate on the same prompt. Before anything is timed, a shorter prompt must give the
logits that the layers give when they are run one by one over the same tokens, and with all tokens going on those of the
stock cache bit for bit.

Example:
    python benchmarks/prefill_fastkv.py --tokens 8192 --ratio 0.2 --budget 0.1
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
from headkv_mm.budgets import parse_budget
from headkv_mm.commands.versions import versions
from headkv_mm.kernels import cpu
from headkv_mm.schedules import TokenSelective
from headkv_mm.tsp_tables import layer_for

CHECKED = 8
"""The checks run on an eighth of the tokens."""


def prompt(tokens: int) -> torch.Tensor:
    """Random tokens, [1, T]."""
    return torch.randint(1024, (1, tokens), generator=torch.Generator().manual_seed(0))


def make(model: LlamaForCausalLM, args: argparse.Namespace, **options: Any) -> HeadKVCache:
    """An empty cache of the method."""
    options = {"tsp_ratio": args.ratio, "tsp_layer": args.tsp_layer, **options}
    return HeadKVCache(model, "fastkv", budget=parse_budget(args.budget), **options)


@torch.no_grad()
def layer_by_layer(model: LlamaForCausalLM, ids: torch.Tensor, layer: int, going: torch.Tensor) -> torch.Tensor:
    """Logits of the last token if only the positions `going` [S] go on after a layer."""
    core, places = model.model, torch.arange(ids.shape[1])
    hidden = core.embed_tokens(ids)
    for index, block in enumerate(core.layers):
        rotations = core.rotary_emb(hidden, places[None])
        hidden = block(hidden, attention_mask=None, position_embeddings=rotations)
        if index == layer:
            hidden, places = hidden[:, going], places[going]
    return model.lm_head(core.norm(hidden[:, -1:]))


def check(model: LlamaForCausalLM, args: argparse.Namespace) -> float:
    """Check a shorter prompt.

    Returns:
        The largest difference to the layers run one by one, as a share of the largest logit.

    Raises:
        SystemExit: if the logits are wrong.
    """
    ids = prompt(args.tokens // CHECKED)
    stock, _ = forward(model, ids, DynamicCache(config=model.config))
    everything, _ = forward(model, ids, make(model, args, tsp_ratio=1.0))
    if not torch.equal(stock, everything):
        raise SystemExit("gate failed: with all tokens going on the logits are not those of the stock cache")
    with torch.no_grad():
        logits = model(ids, past_key_values=make(model, args)).logits
    going = (~logits[0].isnan().any(-1)).nonzero()[:, 0]
    if len(going) != max(round(args.ratio * ids.shape[1]), TokenSelective.tsp_least):
        raise SystemExit(f"gate failed: {len(going)} of {ids.shape[1]} tokens went on")
    expected = layer_by_layer(model, ids, args.tsp_layer, going)
    worst = float((logits[:, -1:] - expected).abs().max() / expected.abs().max())
    if worst > 1e-4:
        raise SystemExit(f"gate failed: logits differ by {worst:.2e} of their size from layers that run one by one")
    return worst


def measure(model: LlamaForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """Time both, alternating."""
    worst, ids = check(model, args), prompt(args.tokens)
    seconds: dict[str, list[float]] = {"stock": [], "fastkv": []}
    report = None
    for number in tqdm(range(args.rounds), desc="rounds"):
        cache = make(model, args)
        runs: list[tuple[str, Any]] = [("stock", DynamicCache(config=model.config)), ("fastkv", cache)]
        for name, held in runs if number % 2 == 0 else runs[::-1]:
            _, spent = forward(model, ids, held)
            seconds[name].append(spent)
        report = cache.report()
    assert report is not None
    ratios = [ours / stock for ours, stock in zip(seconds["fastkv"], seconds["stock"], strict=True)]
    whole = (args.tsp_layer + 1) / args.layers
    return {
        "cpu_seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "limit": whole + (1 - whole) * args.ratio,
        "difference": worst,
        "nbytes": report.nbytes,
        "nbytes_full": report.nbytes_full,
    }


def main() -> None:
    """Parse, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--ratio", type=float, default=0.2, help="of the tokens that go on (default 0.2)")
    parser.add_argument("--tsp-layer", type=int, help="after which they do (default: half of the layers less one)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt (default 8192)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="the median is reported (default 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.warm_up()
    model = build(args.layers, args.heads, args.kv_heads, args.head_dim, args.tokens)
    args.tsp_layer = layer_for(model, args.tsp_layer)
    result = {
        "benchmark": "prefill_fastkv",
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "gate": "passed",
        "result": measure(model, args),
        "versions": versions(),
    }
    print(json.dumps(result["result"], indent=1))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
