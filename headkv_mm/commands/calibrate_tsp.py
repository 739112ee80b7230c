# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate tsp`: after which layer of a model most tokens of a prompt may be left behind, for `fastkv`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headkv_mm.commands.calibrating import add_common_arguments, model_and_settings, run_calibration, text_bar

if TYPE_CHECKING:
    from headkv_mm.tsp_tables import TSPTable

HELP = "measure after which layer fastkv may leave tokens behind"
EXAMPLE = "headkv-mm calibrate tsp path/to/model --output tsp.json"
_SETTINGS = ("texts", "length", "ratio", "tolerance", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_common_arguments(parser, texts=16)
    parser.add_argument("--ratio", type=float, metavar="R", help="share of the tokens that go on (default: 0.2)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="D",
        help="relative distance of the last hidden state that is good enough (default: 0.05)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write the table, print it."""
    from headkv_mm.tsp_tables import save_tsp_table

    return run_calibration(args, _measure, save_tsp_table, _show)


def _measure(args: argparse.Namespace, partial: Path) -> TSPTable:
    from headkv_mm.calibration.tsp import TSPCalibration, calibrate_tsp

    pipe, text, given = model_and_settings(args, _SETTINGS)
    calibration = TSPCalibration(**given)
    with text_bar(args, calibration.texts) as on_text:
        return calibrate_tsp(pipe.model, pipe.tokenizer, calibration, text=text, partial=partial, on_text=on_text)


def _show(table: TSPTable) -> None:
    """The distances by layer, and the layer that was chosen."""
    print("layer  distance of the last hidden state")
    for layer, distance in enumerate(table.distances):
        print(f"{layer:>5}  {distance:.4f}{'  *' if layer == table.layer else ''}")
    print()
    print(
        f"* the first within {table.tolerance:g} of the full run, with {table.ratio:.0%} of the tokens going on; "
        f"mean of {table.texts} texts"
    )
