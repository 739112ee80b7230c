# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate layers`: how much each layer of a model suffers from eviction, for `compresskv`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headkv_mm.commands.calibrating import add_common_arguments, model_and_settings, run_calibration, text_bar
from headkv_mm.commands.option_values import whole_number

if TYPE_CHECKING:
    from headkv_mm.layer_tables import LayerTable

HELP = "measure how far each layer's output moves when it keeps few entries, for compresskv"
EXAMPLE = "headkv-mm calibrate layers path/to/model --head-table retrieval.json --output layers.json"
_SETTINGS = ("texts", "length", "following", "entries", "head_table", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_common_arguments(parser, texts=16)
    parser.add_argument(
        "--head-table",
        metavar="FILE.json",
        help="head table of kind srh, from `headkv-mm heads --kind srh` (default: the one that ships for the model)",
    )
    parser.add_argument(
        "--following",
        type=whole_number(1),
        metavar="N",
        help="last tokens of a text, which are looked at (default: 32)",
    )
    parser.add_argument(
        "--entries", type=whole_number(1), metavar="N", help="entries per KV head that are kept (default: 32)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write the table, print it."""
    from headkv_mm.layer_tables import save_layer_table

    return run_calibration(args, _measure, save_layer_table, _show)


def _measure(args: argparse.Namespace, partial: Path) -> LayerTable:
    from headkv_mm.calibration.layers import LayerCalibration, calibrate_layers

    pipe, text, given = model_and_settings(args, _SETTINGS)
    calibration = LayerCalibration(**given)
    with text_bar(args, calibration.texts) as on_text:
        return calibrate_layers(pipe.model, pipe.tokenizer, calibration, text=text, partial=partial, on_text=on_text)


def _show(table: LayerTable) -> None:
    """The errors by layer, and their shares."""
    total = sum(table.errors)
    print("layer  error  share")
    for layer, error in enumerate(table.errors):
        print(f"{layer:>5}  {error:.3f}  {error / total:>5.1%}")
    print()
    print(f"with {table.entries} entries per KV head; mean of {table.texts} texts")
