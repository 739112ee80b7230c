# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate images | text | heads`: quality and bytes of methods on unseen material, and what heads need."""

from __future__ import annotations

import argparse

from headkv_mm.evaluation import image_command
from headkv_mm.evaluation.heads import command as heads_command
from headkv_mm.evaluation.text import command as text_command

HELP = "measure quality and bytes of every method and budget on unseen captions or documents"
EXAMPLE = text_command.EXAMPLE
KINDS = {"images": image_command, "text": text_command, "heads": heads_command}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for every kind of material."""
    kinds = parser.add_subparsers(dest="what", metavar="images|text|heads", required=True)
    for name, module in KINDS.items():
        one = kinds.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Run what is not finished, write the files, print the table.

    Raises:
        ValueError: for settings that do not fit the methods, the model, or what the folder holds.
        FileNotFoundError: if the embedded weights are missing.
    """
    status: int = KINDS[args.what].run(args)
    return status
