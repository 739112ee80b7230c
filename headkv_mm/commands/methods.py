# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm methods`: the registered methods with their options."""

from __future__ import annotations

import argparse
import json
import textwrap

HELP = "list the compression methods and their options"
EXAMPLE = "headkv-mm methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the methods."""
    from headkv_mm.registry import get_method, methods

    found = [get_method(name) for name in methods()]
    if args.json:
        records = [
            {
                "name": method.name,
                "description": method.description,
                "source": method.source,
                "options": {name: _plain(value) for name, value in method.options.items()},
            }
            for method in found
        ]
        print(json.dumps(records, indent=2))
        return 0
    for method in found:
        source = f" ({method.source})" if method.source else ""
        print(method.name)
        print(textwrap.fill(method.description + source, 100, initial_indent="  ", subsequent_indent="  "))
        if method.options:
            options = ", ".join(f"{name}={value}" for name, value in method.options.items())
            print(textwrap.fill(f"options: {options}", 100, initial_indent="  ", subsequent_indent="    "))
    return 0


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
