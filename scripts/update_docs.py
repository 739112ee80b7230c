#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Put the committed results into README.md and docs/: everything between `<!-- results: NAME -->` and `<!-- end -->`.

Example:
    python scripts/update_docs.py          # rewrite
    python scripts/update_docs.py --check  # exit with 1 if a document is out of date
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headkv_mm import cli
from headkv_mm.budgets import parse_budget
from headkv_mm.demo import text_model_path
from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import interval, percent, table
from headkv_mm.evaluation.text.tables import overview
from headkv_mm.head_tables import SHIPPED, load_head_table
from headkv_mm.shapes import get_shape
from headkv_mm.workload import memory_needed

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when a test loads this file from elsewhere

import head_need_tables
import method_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def images() -> str:
    """The short table of the image evaluation: bytes and quality."""
    content = _load("images/results.json")
    rows = []
    for run in content["runs"]:
        summary = run["summary"]
        full = run["method"] == FULL
        rows.append(
            [
                "full cache" if full else f"`{run['method']}`",
                "" if full else budget_label(run["budget"]),
                percent(summary["bytes_ratio"]),
                interval(summary["outcomes"]["all_right"]),
                "" if full else interval(summary["difference_to_full"]["all_right"], sign=True),
            ]
        )
    return table(["method", "budget", "bytes held", "images all right", "difference to full"], rows)


def decode() -> str:
    """The ragged decode step against dense attention on the CPU."""
    rows = [
        [
            run["distribution"],
            str(content["settings"]["threads"]),
            f"{run['byte_ratio']:.2f}",
            f"{run['speedup_cpu']:.2f}x",
            percent(run["share_of_byte_ratio_cpu"], 0),
        ]
        for content in map(_load, ("cpu/ragged_decode.json", "cpu/ragged_decode_two_threads.json"))
        for run in content["results"]
    ]
    return table(["lengths", "threads", "bytes, dense / ours", "speed-up (CPU time)", "share of the byte ratio"], rows)


def decode_long() -> str:
    """A small share of a long context against dense attention over all of it."""
    rows = []
    for content in map(_load, ("cpu/ragged_decode_long_float32.json", "cpu/ragged_decode_long_bfloat16.json")):
        settings, run = content["settings"], content["results"][0]
        rows.append(
            [
                settings["dtype"],
                f"{percent(settings['keep'], 0)} of {settings['tokens']:,}",
                f"{run['byte_ratio']:.1f}",
                f"{run['speedup_cpu']:.1f}x",
                percent(run["share_of_byte_ratio_cpu"], 0),
            ]
        )
    return table(["dtype", "kept", "bytes, dense / ours", "speed-up (CPU time)", "share of the byte ratio"], rows)


def window_scores() -> str:
    """The price of prefill scores on the CPU."""
    content = _load("cpu/window_scores.json")
    tokens = content["settings"]["tokens"]
    rows = [
        [
            "all" if run["window"] == tokens else str(run["window"]),
            f"{run['scores_cpu_ms']:.0f} ms",
            f"{run['attention_cpu_ms']:.0f} ms",
            percent(run["share_of_attention"], 2),
        ]
        for run in content["results"]
    ]
    return table(["queries", "scores", "attention of the prompt", "share"], rows)


def image_decode() -> str:
    """A whole image with and without compression."""
    rows = []
    for content in map(_load, ("cpu/image_decode.json", "cpu/image_decode_batch_16.json")):
        settings, held, median = content["settings"], content["bytes"], content["median"]
        rows.append(
            [
                f"{settings['batch']} of {settings['grid']} x {settings['grid']}",
                str(settings["threads"]),
                f"`{settings['method']}` {settings['budget']}",
                percent(held["ratio"]),
                percent(held["bookkeeping_share"], 2),
                f"{median['speed_up']:.2f}x",
                percent(median["overhead_share"], 2),
            ]
        )
    heads = ["images", "threads", "method", "bytes held", "bookkeeping", "speed-up, end to end", "method's own time"]
    return table(heads, rows)


def heads() -> str:
    """The head table of the embedded language model, by layer."""
    shipped = load_head_table(text_model_path() / SHIPPED["r2"])
    rows = [
        [str(layer), percent(sum(scores)), *(percent(score) for score in scores)]
        for layer, scores in enumerate(shipped.kv_scores().tolist())
    ]
    names = [f"KV head {head}" for head in range(shipped.kv_heads)]
    said = f"{shipped.answered} of {shipped.examples} prompts were answered right. Shares of all scores:"
    return f"{said}\n\n{table(['layer', 'all its heads', *names], rows)}"


def text_cache() -> str:
    """What selection costs at the end of a prompt, and a long answer at a fixed number of entries."""
    prompt, answer = _load("cpu/text_prefill.json"), _load("cpu/text_decode.json")
    read, written = prompt["result"], answer["result"]
    rows = [
        [
            f"a prompt of {prompt['settings']['tokens']:,} tokens",
            f"`{prompt['settings']['method']}` {prompt['settings']['budget']}",
            percent(read["ratio"]),
            f"{percent(read['overhead'])} more CPU time than the stock cache",
        ],
        [
            f"an answer of {answer['settings']['tokens']:,} tokens",
            f"`{answer['settings']['method']}` {answer['settings']['budget']}",
            percent(written["ratio"]),
            f"{written['speed_up']:.2f}x faster over all, {written['speed_up_last_quarter']:.2f}x in the last quarter",
        ],
    ]
    return table(["what", "method", "bytes held", "CPU time"], rows)


def fastkv_prefill() -> str:
    """Reading a long prompt where only chosen tokens go on after half of the layers."""
    content = _load("cpu/fastkv_prefill.json")
    settings, result = content["settings"], content["result"]
    row = [
        f"{settings['tokens']:,}",
        f"{settings['layers']}, of which {settings['tsp_layer'] + 1} see all tokens",
        percent(settings["ratio"], 0),
        percent(result["limit"], 0),
        percent(result["ratio"]),
        percent(result["nbytes"] / result["nbytes_full"]),
    ]
    heads = ["tokens", "layers", "tokens that go on", "layer-tokens", "CPU time of the stock prefill", "bytes held"]
    return table(heads, [row])


def text() -> str:
    """Methods by budgets, the document compressed before its question is known."""
    return _text_overview("text/results.json")


def text_query_aware() -> str:
    """Methods by budgets, document and question compressed together."""
    return _text_overview("text_query_aware/results.json")


MIXED = {
    "text_mixed": "before, the documents above",
    "text_mixed_held_out": "before, other documents (seed 1)",
    "text_mixed_query_aware": "after, the documents below",
}


def text_mixed() -> str:
    """Budgets of one method with the scores of another."""
    rows = []
    for folder, when in MIXED.items():
        runs = _load(f"{folder}/results.json")["runs"]
        full = percent(next(run for run in runs if run["method"] == FULL)["summary"]["exact"]["mean"])
        rows += [
            [
                f"`{run['method']}` with {', '.join(f'`{name}={value}`' for name, value in run['options'].items())}",
                when,
                budget_label(run["budget"]),
                interval(run["summary"]["exact"]),
                full,
            ]
            for run in runs
            if "scorer" in run["options"]
        ]
    return table(["method", "compressed before or after the question", "budget", "documents right", "full cache"], rows)


def _text_overview(name: str) -> str:
    content = _load(name)
    found = [run["summary"]["exact"] for run in content["runs"]]
    widest = max(max(one["high"] - one["mean"], one["mean"] - one["low"]) for one in found)
    documents = found[0]["documents"]
    note = f"{documents} documents; 95 % intervals reach at most {100 * widest:.1f} points to a side."
    return f"{overview(content)}\n\n{note}"


def text_short() -> str:
    """Chosen methods, the document compressed before and after its question is known."""
    chosen = (FULL, "headkv-r2", "keydiff", "headkv", "r-kv", "snapkv", "adakv", "streaming", "random")
    columns = [
        ("text", 1 / 2),
        ("text", 1 / 4),
        ("text", 1 / 8),
        ("text_query_aware", 1 / 4),
        ("text_query_aware", 1 / 8),
    ]
    found = {
        (name, run["method"], None if run["method"] == FULL else run["budget"]): run["summary"]["exact"]["mean"]
        for name in ("text", "text_query_aware")
        for run in _load(f"{name}/results.json")["runs"]
    }
    rows = [
        [
            "full cache" if method == FULL else f"`{method}`",
            *(percent(found[name, method, None if method == FULL else budget], 0) for name, budget in columns),
        ]
        for method in chosen
    ]
    mixed = {
        (name, run["budget"]): percent(run["summary"]["exact"]["mean"], 0)
        for name, folder in (("text", "text_mixed"), ("text_query_aware", "text_mixed_query_aware"))
        for run in _load(f"{folder}/results.json")["runs"]
        if run["method"] == "headkv-r2"
    }
    cells = [mixed.get(column, "") for column in columns]
    rows.insert(1, ["`headkv-r2` with `scorer=keydiff`", *cells])
    heads = [f"{'before' if name == 'text' else 'after'}, {budget_label(budget)}" for name, budget in columns]
    return table(["compressed before or after the question is known", *heads], rows)


def text_tasks() -> str:
    """Methods by tasks at a quarter of the entries."""
    content = _load("text/results.json")
    tasks, budget = content["settings"]["tasks"], 1 / 4
    rows = [
        [
            "full cache" if run["method"] == FULL else f"`{run['method']}` {budget_label(budget)}",
            *(percent(run["summary"]["by_task"][task], 0) for task in tasks),
        ]
        for run in content["runs"]
        if run["method"] == FULL or run["budget"] == budget
    ]
    return table(["method", *tasks], rows)


def image_throughput() -> str:
    """Images of a published model's shape: the loop that comes with it, our loop, and methods."""
    rows = []
    for content in map(_load, ("cpu/image_throughput_batch_1.json", "cpu/image_throughput_batch_4.json")):
        for batch in content["batches"]:
            for run in batch["results"]:
                names = {"own loop": "full cache, the model's own loop", "full": "full cache, our loop"}
                compressed = run["method"] not in names
                rows.append(
                    [
                        f"{batch['batch']}",
                        f"`{run['method']}` {run['budget']}" if compressed else names[run["method"]],
                        percent(run["cache_ratio"]),
                        f"{run['cpu_seconds']:.1f} s",
                        f"{run['cpu_speed_up_over_own_loop']:.2f}x",
                        f"{run['cpu_speed_up']:.2f}x",
                        percent(run["parts"]["attention"]),
                        # Writing into a static cache is not timed by itself.
                        "" if run["method"] == "own loop" else percent(run["parts"]["cache"]),
                    ]
                )
    heads = [
        "images",
        "cache",
        "bytes held",
        "CPU time",
        "against own loop",
        "against our loop",
        "attention",
        "the cache's work",
    ]
    return table(heads, rows)


PUBLISHED = [  # shape, images together, method, budget, published factor, published bytes, where
    ("llamagen-xl-384", 128, "headkv", "1/4", "2.36x", "", "arXiv 2605.20600"),
    ("llamagen-xl-384", 128, "headkv", "1/6", "3.00x", "33.91 to 12.34 GB", "arXiv 2605.20600"),
    ("llamagen-xl-384", 256, "lines", "1/4", "5.18x", "", "arXiv 2512.04857"),
    ("llamagen-xl-384", 256, "lines", "1/6", "7.57x", "64.75 to 20.97 GB", "arXiv 2512.04857"),
    ("janus-pro-7b", 55, "headkv", "1/6", "3.68x", "", "arXiv 2605.20600"),
    ("janus-pro-7b", 55, "headkv", "1/8", "3.89x", "", "arXiv 2605.20600"),
    ("janus-pro-7b", 64, "lines", "1/6", "5.62x", "", "arXiv 2512.04857"),
    ("lumina-mgpt-768", 6, "headkv", "1/8", "1.60x", "", "arXiv 2605.20600"),
    ("lumina-mgpt-768", 12, "lines", "1/8", "2.13x", "", "arXiv 2512.04857"),
    ("lumina-mgpt-1024", 8, "lines", "1/8", "2.64x", "", "arXiv 2512.04857"),
]


def published() -> str:
    """Published factors, and the memory that we plan for the same setting."""
    rows = []
    for name, batch, method, budget, factor, gigabytes, source in PUBLISHED:
        work = get_shape(name).workload()
        full, ours = (
            memory_needed(work, chosen, batch=batch, budget=kept).total / 1e9
            for chosen, kept in (("none", None), (method, parse_budget(budget)))
        )
        planned = f"{full:.1f} to {ours:.1f} GB"
        rows.append([name, str(batch), f"`{method}` {budget}", factor, gigabytes, planned, "not run", source])
    heads = ["shape", "images", "method", "published", "published memory", "memory we plan", "ours", "source"]
    return table(heads, rows)


def plan_images() -> str:
    """What `headkv-mm plan` says of an image model."""
    return _plan("--model", "llamagen-xl-384", "--memory", "24GiB", "--batch", "200")


def plan_texts() -> str:
    """What `headkv-mm plan` says of a language model."""
    return _plan("--model", "qwen3-8b", "--memory", "48GiB", "--tokens", "32768", "--chunk", "2048", "--batch", "16")


def plan_glm_image() -> str:
    """What `headkv-mm plan` says where compression saves little."""
    return _plan("--model", "glm-image", "--memory", "24GiB")


def plan_list() -> str:
    """The built-in shapes."""
    return _plan("--list")


def _plan(*words: str) -> str:
    """The command and its output, which depends on nothing but the code."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main(["plan", *words])
    return f"```bash\nheadkv-mm plan {' '.join(words)}\n```\n\n```text\n{output.getvalue().rstrip()}\n```"


MAKERS: dict[str, Callable[[], str]] = {
    "image-throughput": image_throughput,
    "published": published,
    "plan-images": plan_images,
    "plan-texts": plan_texts,
    "plan-glm-image": plan_glm_image,
    "plan-list": plan_list,
    "heads": heads,
    "layer-errors": method_tables.layer_errors,
    "images-methods": method_tables.images_methods,
    "method-rows": method_tables.method_rows,
    "segments": method_tables.segments,
    "compiled-tables": method_tables.compiled_tables,
    "head-needs": head_need_tables.needs,
    "head-predictors-images": head_need_tables.predictors_of_images,
    "head-predictors-text": head_need_tables.predictors_of_texts,
    "head-rankings-images": head_need_tables.rankings_of_images,
    "head-rankings-text": head_need_tables.rankings_of_texts,
    "images": images,
    "text-cache": text_cache,
    "fastkv-prefill": fastkv_prefill,
    "decode": decode,
    "decode-long": decode_long,
    "window-scores": window_scores,
    "image-decode": image_decode,
    "text": text,
    "text-query-aware": text_query_aware,
    "text-mixed": text_mixed,
    "text-short": text_short,
    "text-tasks": text_tasks,
}


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def updated(text: str) -> str:
    """The document with every block made anew.

    Raises:
        KeyError: for a block whose results nobody makes.
    """
    return BLOCK.sub(lambda match: f"{match[1]}{MAKERS[match[2]]()}\n{match[4]}", text)


def main() -> int:
    """Rewrite or check every document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    args = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if args.check else 'updated'}: {', '.join(stale)}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
