# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate KIND`: measure once, on one model, what a method needs to know about it."""

from __future__ import annotations

import argparse
from types import ModuleType

from headkv_mm.commands import calibrate_layers, calibrate_tables, calibrate_tsp

HELP = "measure once what a method needs to know about a model"
EXAMPLE = "headkv-mm calibrate tsp path/to/model --output tsp.json"
KINDS: dict[str, ModuleType] = {"tsp": calibrate_tsp, "layers": calibrate_layers, "tables": calibrate_tables}
"""A module per kind, with HELP, EXAMPLE, add_arguments and run, as the modules of the commands have them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for every kind."""
    kinds = parser.add_subparsers(dest="kind", metavar="|".join(KINDS), required=True)
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
    """Measure, and write the table."""
    status: int = KINDS[args.kind].run(args)
    return status
