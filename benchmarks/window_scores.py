# SPDX-License-Identifier: Apache-2.0
"""The price of prefill scores: `window_scores` against the prompt's own attention, on the CPU.

For each window, the scores of one layer (pooled over 7 slots) and causal `scaled_dot_product_attention` over the prompt
take turns, so that a busy machine disturbs both. The window `all` makes every token of the prompt a query.

The scores are first compared with the float64 reference. Without agreement nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headkv_mm import kernels
from headkv_mm.commands.versions import versions
from headkv_mm.kernels import reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-5
POOL = 7
EXAMPLE = """example:
  python benchmarks/window_scores.py --threads 1 --tokens 8192 --windows 32 64 --json output/window_scores.json"""


class Problem:
    """One layer's prompt: queries of all tokens, and their keys as a ragged cache holds them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.heads, self.group = options.tokens, options.heads, options.group
        dtype, size = DTYPES[options.dtype], options.head_size
        generator = torch.Generator().manual_seed(options.seed)
        self.queries = torch.randn(1, self.tokens, self.heads * self.group, size, generator=generator).to(dtype)
        self.keys = torch.randn(self.heads * self.tokens, size, generator=generator).to(dtype)
        self.positions = torch.arange(self.tokens, dtype=torch.int32)
        self.start = (torch.arange(self.heads) * self.tokens).int()[None]
        self.length = torch.full((1, self.heads), self.tokens, dtype=torch.int32)
        self.scale = size**-0.5
        # Repeated ahead of time: attention is spared it.
        self.full_queries = self.queries.transpose(1, 2).contiguous()  # [1, H, T, D]
        self.full_keys = self.keys.view(1, self.heads, self.tokens, size).repeat_interleave(self.group, 1)

    def scores(self, window: int, backend: Any, dtype: torch.dtype) -> Tensor:
        """`window_scores` of the last `window` tokens, [N]."""
        out: Tensor = backend.window_scores(
            self.queries[:, -window:].to(dtype),
            self.positions[None, -window:],
            self.keys.to(dtype),
            self.positions.repeat(self.heads),
            self.start,
            self.length,
            scale=self.scale,
            pool=POOL,
        )
        return out

    def attention(self) -> None:
        """The prompt's attention."""
        torch.nn.functional.scaled_dot_product_attention(
            self.full_queries, self.full_keys, self.full_keys, is_causal=True, scale=self.scale
        )

    def error(self, window: int) -> float:
        """Largest error of the timed call against the float64 reference."""
        got, want = (
            self.scores(window, backend, dtype).double()
            for backend, dtype in ((kernels, self.keys.dtype), (reference, torch.float64))
        )
        return float((got - want).abs().max()) if bool(got.isfinite().all()) else float("inf")


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def measure(problem: Problem, window: int, repeats: int) -> dict[str, Any]:
    """Check, then time one window.

    Raises:
        SystemExit: the kernel disagrees with the reference.
    """
    error = problem.error(window)
    if error > TOLERANCE:
        raise SystemExit(f"window {window}: off by {error:.1e} from the reference ({TOLERANCE:.0e} allowed), not timed")
    dtype = problem.keys.dtype
    pairs = [
        (seconds(lambda: problem.scores(window, kernels, dtype)), seconds(problem.attention)) for _ in range(repeats)
    ]
    scores, attention = (statistics.median(column) for column in zip(*pairs))
    return {
        "window": window,
        "largest_error": error,
        "scores_cpu_ms": 1e3 * scores,
        "attention_cpu_ms": 1e3 * attention,
        "share_of_attention": statistics.median(mine / theirs for mine, theirs in pairs),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="(default %(default)s)")
    parser.add_argument("--windows", nargs="+", default=["32"], help='numbers, or "all" (default 32)')
    parser.add_argument("--heads", type=int, default=8, help="KV heads (default %(default)s)")
    parser.add_argument("--group", type=int, default=2, help="query heads per KV head (default %(default)s)")
    parser.add_argument("--head-size", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    for window in options.windows:
        if window != "all" and not (window.isdecimal() and 1 <= int(window) <= options.tokens):
            parser.error(f'--windows takes numbers from 1 to --tokens ({options.tokens}) or "all", got {window!r}')
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    problem = Problem(options)
    results = []
    print(f"{'window':>8}{'scores ms':>12}{'attention ms':>14}{'share':>9}")
    for window in options.windows:
        result = measure(problem, options.tokens if window == "all" else int(window), options.repeats)
        results.append(result)
        print(
            f"{window:>8}{result['scores_cpu_ms']:12.1f}{result['attention_cpu_ms']:14.1f}"
            f"{100 * result['share_of_attention']:8.2f}%"
        )
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_name(options.json.name + ".tmp")
        temporary.write_text(
            json.dumps({"versions": versions(), "settings": settings, "results": results}, indent=2) + "\n"
        )
        os.replace(temporary, options.json)
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
