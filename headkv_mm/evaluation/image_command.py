# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate images`: quality and bytes of every method and budget on unseen captions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headkv_mm.evaluation.argument_values import budgets, names, option, whole
from headkv_mm.evaluation.every_method import methods_meant

HELP = "generate unseen captions with every method and budget; measure quality and bytes"
EXAMPLE = "headkv-mm evaluate images --methods headkv,lines,streaming --budgets 1/4,1/6,1/8 --output evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "--methods",
        type=names,
        default=("none", "headkv", "lines", "streaming"),
        metavar="NAMES",
        help="separated by commas, or all; the full cache (none) is always among them "
        "(default: none,headkv,lines,streaming)",
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        default=(1 / 4, 1 / 6, 1 / 8),
        metavar="BUDGETS",
        help="separated by commas: shares of the image's entries (1/6) or entries per KV head (64) "
        "(default: 1/4,1/6,1/8)",
    )
    parser.add_argument("--captions", type=whole(1), default=256, metavar="N", help="unseen captions (default: 256)")
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="S", help="captions and random numbers (default: 0)"
    )
    parser.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="images together (default: 64)")
    parser.add_argument(
        "--first-eviction-rows",
        type=whole(1),
        default=4,
        metavar="N",
        help="image rows before the first eviction, for all methods (default: 4)",
    )
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="option of one method, or of all that have it; repeatable",
    )
    parser.add_argument(
        "--resamples", type=whole(1), default=10_000, metavar="N", help="of the bootstrap (default: 10000)"
    )
    parser.add_argument(
        "--pictures", type=whole(0), default=6, metavar="N", help="captions in the picture grid (default: 6)"
    )
    parser.add_argument("--model", metavar="FOLDER", help="model folder (default: the embedded model)")
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the results; finished runs in it are not run again"
    )
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of the table")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run what is not finished, write the files, print the table.

    Raises:
        ValueError: for settings that do not fit the methods, the model, or what the folder holds.
        FileNotFoundError: if the embedded weights are missing.
    """
    from headkv_mm.evaluation.report import evaluate
    from headkv_mm.evaluation.runner import open_model
    from headkv_mm.evaluation.settings import EvaluationSettings
    from headkv_mm.evaluation.tables import markdown

    model = open_model(args.model, args.device)
    settings = EvaluationSettings(
        methods=methods_meant(args.methods, model, "image"),
        budgets=args.budgets,
        captions=args.captions,
        seed=args.seed,
        batch_size=args.batch_size,
        first_eviction_rows=args.first_eviction_rows,
        options=tuple(args.option),
        resamples=args.resamples,
        pictures=min(args.pictures, args.captions),
    )
    content = evaluate(model, settings, Path(args.output), progress=not args.no_progress)
    print(json.dumps(content, indent=1) if args.json else markdown(content))
    return 0
