# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate heads`: what foretells the entries that a head will need."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headkv_mm.evaluation.argument_values import budgets, names, whole

HELP = "measure what foretells how many entries a head will need, on the full cache"
EXAMPLE = "headkv-mm evaluate heads images --captions 32 --budgets 1/4,1/8,1/16 --output heads"

_CAPTIONS, _DOCUMENTS = 32, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("material", choices=("images", "text"), help="captions or documents")
    parser.add_argument("--captions", type=whole(2), metavar="N", help=f"unseen captions (default: {_CAPTIONS})")
    parser.add_argument("--documents", type=whole(2), metavar="N", help=f"unseen documents (default: {_DOCUMENTS})")
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="S", help="captions or documents, and random numbers (default: 0)"
    )
    parser.add_argument(
        "--budgets",
        type=budgets,
        default=(1 / 4, 1 / 8, 1 / 16),
        metavar="BUDGETS",
        help="separated by commas: shares of the entries (1/8) or entries per KV head (64) (default: 1/4,1/8,1/16)",
    )
    parser.add_argument(
        "--floor",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the mean budget that every head gets (default: 0.25)",
    )
    parser.add_argument(
        "--rows", type=whole(2), default=4, metavar="N", help="image rows before the first choice (default: 4)"
    )
    parser.add_argument("--tasks", type=names, metavar="NAMES", help="of the documents (default: as evaluate text)")
    parser.add_argument("--length", type=whole(1), default=1024, metavar="TOKENS", help="of a document (default: 1024)")
    parser.add_argument("--window", type=whole(1), default=32, metavar="QUERIES", help="of a document (default: 32)")
    parser.add_argument("--batch-size", type=whole(1), default=8, metavar="N", help="items in a file (default: 8)")
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
    """Measure what is not finished, write the files, print the table.

    Raises:
        ValueError: for settings that do not fit the material, the model, or what the folder holds.
        FileNotFoundError: if the embedded weights are missing.
    """
    from headkv_mm.evaluation.heads.material import Images, Material, Texts
    from headkv_mm.evaluation.heads.report import evaluate_heads
    from headkv_mm.evaluation.heads.settings import HeadSettings
    from headkv_mm.evaluation.heads.tables import markdown
    from headkv_mm.evaluation.runner import open_model
    from headkv_mm.evaluation.text.runner import open_text_model
    from headkv_mm.evaluation.text.settings import DEFAULT_TASKS

    images = args.material == "images"
    if (args.documents if images else args.captions) is not None:
        right, wrong = ("--captions", "--documents") if images else ("--documents", "--captions")
        raise ValueError(f"{wrong} says nothing of {args.material}: use {right}")
    settings = HeadSettings(
        material=args.material,
        items=(args.captions or _CAPTIONS) if images else (args.documents or _DOCUMENTS),
        seed=args.seed,
        budgets=args.budgets,
        floor=args.floor,
        batch_size=args.batch_size,
        rows=args.rows,
        tasks=args.tasks or DEFAULT_TASKS,
        length=args.length,
        window=args.window,
        resamples=args.resamples,
    )
    material: Material
    if images:
        material = Images(open_model(args.model, args.device), settings)
    else:
        material = Texts(*open_text_model(args.model, args.device), settings)
    content = evaluate_heads(material, settings, Path(args.output), progress=not args.no_progress)
    print(json.dumps(content, indent=1) if args.json else markdown(content))
    return 0
