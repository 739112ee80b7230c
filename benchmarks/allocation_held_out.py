#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the chosen rules and the methods beside them on captions and documents that no choice was made on.

Every seed is an evaluation of its own, as `headkv-mm evaluate` makes it, in a folder of its own; finished runs there
are not run again. Then all captions or documents of all seeds are pooled. results.json and table.md say, per budget,
quality and bytes, the paired differences of the chosen rule to every other method, and whether their intervals overlap.

Example:
    python benchmarks/allocation_held_out.py images --runs build/held_out/images --output build/held_out
    python benchmarks/allocation_held_out.py text --runs build/held_out/text --output build/held_out
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocation_held_out_table import table
from allocation_pooling import MATERIALS, pool
from allocation_rules import CHOSEN

from headkv_mm.evaluation.argument_values import budgets, names, option, whole, whole_numbers
from headkv_mm.evaluation.method_options import AskedOption
from headkv_mm.evaluation.report import evaluate
from headkv_mm.evaluation.runner import open_model
from headkv_mm.evaluation.settings import EvaluationSettings
from headkv_mm.evaluation.storage import read_json, write_json, write_text
from headkv_mm.evaluation.text.report import evaluate_text
from headkv_mm.evaluation.text.runner import open_text_model
from headkv_mm.evaluation.text.settings import TextSettings

METHODS = {
    "images": ("none", "headkv", "lines", "adakv", "logit-spread", CHOSEN),
    "text": ("none", "headkv", "keydiff", "adakv", "headkv-r2", CHOSEN),
}
BUDGETS = {"images": (1 / 4, 1 / 8, 1 / 12), "text": (1 / 4, 1 / 8, 1 / 16)}
OPTIONS: tuple[AskedOption, ...] = (("headkv-r2", "scorer", "keydiff"),)


def evaluate_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The evaluation of one seed, or what its folder has of it."""
    folder = args.runs / str(seed)
    if args.kind == "images":
        settings = EvaluationSettings(
            methods=args.methods,
            budgets=args.budgets,
            captions=args.captions,
            seed=seed,
            batch_size=args.batch_size or 64,
            options=args.option,
            resamples=args.resamples,
            pictures=0,
        )
        return evaluate(open_model(args.model, args.device), settings, folder, progress=not args.no_progress)
    settings_of_text = TextSettings(
        lengths=(args.length,),
        methods=args.methods,
        budgets=args.budgets,
        documents=args.documents,
        seed=seed,
        batch_size=args.batch_size or 16,
        options=args.option,
        resamples=args.resamples,
    )
    model, tokenizer = open_text_model(args.model, args.device)
    return evaluate_text(model, tokenizer, settings_of_text, folder, progress=not args.no_progress)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the defaults of the kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(MATERIALS))
    parser.add_argument("--methods", type=names, metavar="NAMES", help="the chosen rule must be among them")
    parser.add_argument(
        "--chosen", default=CHOSEN, metavar="NAME", help=f"compared with the others (default: {CHOSEN})"
    )
    parser.add_argument("--budgets", type=budgets, metavar="BUDGETS")
    parser.add_argument("--seeds", type=whole_numbers, default=(5, 6, 7), metavar="SEEDS")
    parser.add_argument("--captions", type=whole(1), default=256, metavar="N", help="per seed")
    parser.add_argument("--documents", type=whole(1), default=37, metavar="N", help="of every task, per seed")
    parser.add_argument("--length", type=whole(1), default=1024, metavar="TOKENS", help="of a document")
    parser.add_argument("--batch-size", type=whole(1), metavar="N", help="default: 64 images, 16 documents")
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        metavar="METHOD.NAME=VALUE",
        help="repeatable (default: headkv-r2.scorer=keydiff where that method is compared)",
    )
    parser.add_argument("--resamples", type=whole(1), default=10_000, metavar="N")
    parser.add_argument("--model", metavar="FOLDER", help="default: the embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="gets a folder for every seed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets results.json and table.md")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)
    args.methods = args.methods or METHODS[args.kind]
    args.budgets = args.budgets or BUDGETS[args.kind]
    if args.option is None:
        args.option = [one for one in OPTIONS if args.kind == "text" and one[0] in args.methods]
    args.option = tuple(args.option)
    if args.chosen not in args.methods:
        parser.error(f"the chosen rule {args.chosen} is not among the methods {', '.join(args.methods)}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, pool the seeds, and write what came out."""
    args = parsed(arguments)
    contents = {}
    for seed in dict.fromkeys(args.seeds):
        began = time.perf_counter()
        contents[seed] = evaluate_seed(args, seed)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    path = args.output / "results.json"
    content: dict[str, Any] = read_json(path) if path.is_file() else {"format": 1}
    origin = {str(seed): found["origin"] for seed, found in contents.items()}
    content[args.kind] = {"origin": origin, **pool(contents, args.kind, args.chosen, args.resamples)}
    write_json(path, content)
    write_text(args.output / "table.md", table(read_json(path)))
    print(table(read_json(path)))


if __name__ == "__main__":
    main()
