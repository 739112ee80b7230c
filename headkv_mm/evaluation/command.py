# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate images`: quality and bytes of every method and budget on unseen captions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "measure quality and bytes of every method and budget on unseen captions"
EXAMPLE = "headkv-mm evaluate images --methods headkv,lines,streaming --budgets 1/4,1/6,1/8 --output evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("what", choices=("images",), help="what is generated and measured")
    parser.add_argument(
        "--methods",
        type=_names,
        default=("none", "headkv", "lines", "streaming"),
        metavar="NAMES",
        help="separated by commas; the full cache (none) is always among them (default: none,headkv,lines,streaming)",
    )
    parser.add_argument(
        "--budgets",
        type=_budgets,
        default=(1 / 4, 1 / 6, 1 / 8),
        metavar="BUDGETS",
        help="separated by commas: shares of the image's entries (1/6) or entries per KV head (64) "
        "(default: 1/4,1/6,1/8)",
    )
    parser.add_argument("--captions", type=_whole(1), default=256, metavar="N", help="unseen captions (default: 256)")
    parser.add_argument(
        "--seed", type=_whole(0), default=0, metavar="S", help="captions and random numbers (default: 0)"
    )
    parser.add_argument("--batch-size", type=_whole(1), default=64, metavar="N", help="images together (default: 64)")
    parser.add_argument(
        "--first-eviction-rows",
        type=_whole(1),
        default=4,
        metavar="N",
        help="image rows before the first eviction, for all methods (default: 4)",
    )
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="option of one method, or of all that have it; repeatable",
    )
    parser.add_argument(
        "--resamples", type=_whole(1), default=10_000, metavar="N", help="of the bootstrap (default: 10000)"
    )
    parser.add_argument(
        "--pictures", type=_whole(0), default=6, metavar="N", help="captions in the picture grid (default: 6)"
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

    settings = EvaluationSettings(
        methods=args.methods,
        budgets=args.budgets,
        captions=args.captions,
        seed=args.seed,
        batch_size=args.batch_size,
        first_eviction_rows=args.first_eviction_rows,
        options=tuple(args.option),
        resamples=args.resamples,
        pictures=min(args.pictures, args.captions),
    )
    model = open_model(args.model, args.device)
    content = evaluate(model, settings, Path(args.output), progress=not args.no_progress)
    print(json.dumps(content, indent=1) if args.json else markdown(content))
    return 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no method is named: give some, separated by commas")
    return names


def _budgets(text: str) -> tuple[Any, ...]:
    from headkv_mm.budgets import parse_budget

    try:
        budgets = tuple(parse_budget(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if any(isinstance(budget, str) for budget in budgets):
        raise argparse.ArgumentTypeError("a budget in bytes depends on the batch: give shares or entries per KV head")
    if not budgets:
        raise argparse.ArgumentTypeError("no budget is given: give some, separated by commas")
    return budgets


def _option(text: str) -> tuple[str | None, str, Any]:
    """Read "tau=0.8" or "headkv.tau=0.8"; values are JSON, or plain text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE or METHOD.NAME=VALUE, got {text!r}")
    method, _, option = name.rpartition(".")
    words: dict[str, Any] = {"True": True, "False": False, "None": None}
    try:
        parsed = words[value] if value in words else json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    return method or None, option, parsed


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return number

    return read
