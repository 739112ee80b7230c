# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm heads --online`: the types and budgets that `headkv` gives the heads for one text, without calibration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.compile_kernels import compile_cpu_kernels
from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.option_values import budget, option
from headkv_mm.commands.output_folder import OutputFolder
from headkv_mm.pipelines.defaults import DEFAULT_BUDGET

if TYPE_CHECKING:
    from headkv_mm.memory import CacheReport
    from headkv_mm.pipelines import Document

ONLINE_OPTIONS = ("document", "prompt", "kv_budget", "kv_option")
METHOD = "headkv"
EXAMPLE_DOCUMENT = "notes-1000"


def add_online_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of --online."""
    online = parser.add_argument_group("looking at one text")
    online.add_argument(
        "--online", action="store_true", help="no measuring: head types and budgets that headkv finds in one text"
    )
    text = online.add_mutually_exclusive_group()
    text.add_argument("--document", metavar="FILE", help=".txt, .md, .html or .pdf (default: an example)")
    text.add_argument("--prompt", metavar="TEXT", help="the text itself")
    online.add_argument(
        "--kv-budget",
        type=budget,
        metavar="BUDGET",
        help=f"share of the tokens (1/4), entries per KV head (256) or bytes (64MiB) (default: {DEFAULT_BUDGET})",
    )
    online.add_argument(
        "--kv-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of headkv, such as tau=0.95; repeatable",
    )


def run_online(args: argparse.Namespace, path: Path) -> None:
    """Read the text, write report and picture, print the table.

    Raises:
        ValueError: for a text that cannot be read, is too long for the model, or fits the budget.
        OSError: for a file that cannot be opened.
    """
    from headkv_mm.commands.versions import versions
    from headkv_mm.plots import head_map

    with OutputFolder(path.parent) as folder:
        source, document = _read(args)
        report = document.cache.report()
        if report.types is None:
            raise ValueError(
                f"the text has {report.tokens_seen} tokens and fits the budget, so no head was given a type: give a "
                "longer text or a smaller --kv-budget"
            )
        content = {"versions": versions(), "model": args.model, "document": source, **report.to_dict()}
        folder.write_json(path.name, content)
        title = f"{METHOD}: {source}, {report.tokens_seen} tokens"
        head_map(report, title).savefig(folder.new(path.with_suffix(".png").name))
    if args.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print_table(report, path)


def _read(args: argparse.Namespace) -> tuple[str, Document]:
    """What was read, in a word, and the document."""
    import headkv_mm
    from headkv_mm.demo.documents.examples import example_documents

    settings: dict[str, Any] = {} if args.device is None else {"device": usable_device(args.device)}
    qa = headkv_mm.pipeline(
        "long-document-question-answering",
        args.model,
        kv_compression=METHOD,
        kv_budget=args.kv_budget or DEFAULT_BUDGET,
        kv_options=dict(args.kv_option),
        max_new_tokens=1,  # nothing is asked: the text may have all positions
        **settings,
    )
    if qa.device.type == "cpu":
        compile_cpu_kernels((qa.model.dtype,))
    if args.prompt is not None:
        return "the prompt", qa.read(text=args.prompt)
    if args.document is not None:
        return Path(args.document).name, qa.read(args.document)
    example = next(item for item in example_documents() if item.name == EXAMPLE_DOCUMENT)
    return example.document.name, qa.read(example.document)


def _print_table(report: CacheReport, path: Path) -> None:
    """A line per layer: L or G and the entries of every head."""
    kept = [length for layer in report.lengths for length in layer[0]]
    mean = sum(kept) / len(kept)
    print(
        f"{report.tokens_seen} tokens; {mean:.0f} kept per KV head on the average; {report.local_share:.0%} are local"
    )
    print()
    print("layer  its KV heads: L local, G global, and the entries kept")
    for layer, (types, lengths) in enumerate(zip(report.types or [], report.lengths)):
        heads = "  ".join(f"{kind[0].upper()} {length:>5}" for kind, length in zip(types[0], lengths[0]))
        print(f"{layer:>5}  {heads}")
    print()
    print(path)
    print(path.with_suffix(".png"))
