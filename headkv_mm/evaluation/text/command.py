# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate text`: quality and bytes of every method and budget on unseen documents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headkv_mm.evaluation.argument_values import budgets, names, option, whole, whole_numbers
from headkv_mm.evaluation.every_method import ALL, methods_meant

HELP = "ask questions about unseen documents with every method and budget; measure quality and bytes"
EXAMPLE = "headkv-mm evaluate text --tasks single,list --methods snapkv,adakv --budgets 1/4,1/8 --output evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "--tasks",
        type=names,
        metavar="NAMES",
        help="separated by commas: single, multi-key, multi-value, multi-query, variable-tracking, list, two-turn, "
        "frequent-words, long-generation (default: the first seven)",
    )
    parser.add_argument(
        "--methods",
        type=names,
        default=(ALL,),
        metavar="NAMES",
        help="separated by commas; none, streaming and random are always among them (default: all, which is every "
        "method for text that the model has the tables for)",
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        default=(1 / 4, 1 / 8, 1 / 16),
        metavar="BUDGETS",
        help="separated by commas: shares of the tokens (1/8) or entries per KV head (64) (default: 1/4,1/8,1/16)",
    )
    parser.add_argument(
        "--lengths",
        type=whole_numbers,
        default=(512, 1024, 2048),
        metavar="TOKENS",
        help="separated by commas: tokens of a document and its question (default: 512,1024,2048)",
    )
    parser.add_argument(
        "--documents", type=whole(1), default=64, metavar="N", help="of every task and length (default: 64)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S", help="chooses the documents (default: 0)")
    parser.add_argument(
        "--query-aware",
        action="store_true",
        help="compress after document and question together (default: before any question is known)",
    )
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="N", help="documents together (default: 16)")
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="option of one method, or of all that have it; repeatable",
    )
    parser.add_argument(
        "--resamples", type=whole(1), default=2_000, metavar="N", help="of the bootstrap (default: 2000)"
    )
    parser.add_argument("--model", metavar="FOLDER", help="model folder or id (default: the embedded model)")
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the results; what it holds is not run again"
    )
    parser.add_argument("--json", action="store_true", help="print what results.json holds instead of the table")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run what is not finished, write the files, print the table.

    Raises:
        ValueError: for settings that do not fit the methods, the model, or what the folder holds.
        FileNotFoundError: if the embedded weights are missing.
    """
    from headkv_mm.evaluation.text.report import evaluate_text
    from headkv_mm.evaluation.text.runner import open_text_model
    from headkv_mm.evaluation.text.settings import DEFAULT_TASKS, TextSettings
    from headkv_mm.evaluation.text.tables import markdown

    model, tokenizer = open_text_model(args.model, args.device)
    settings = TextSettings(
        tasks=args.tasks or DEFAULT_TASKS,
        lengths=args.lengths,
        methods=methods_meant(args.methods, model, "text"),
        budgets=args.budgets,
        documents=args.documents,
        seed=args.seed,
        query_aware=args.query_aware,
        batch_size=args.batch_size,
        options=tuple(args.option),
        resamples=args.resamples,
    )
    content = evaluate_text(model, tokenizer, settings, Path(args.output), progress=not args.no_progress)
    print(json.dumps(content, indent=1) if args.json else markdown(content))
    return 0
