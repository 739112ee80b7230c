# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate tables`: compile what heads and scores are worth in a model, for `compilerkv`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headkv_mm.commands.calibrating import add_common_arguments, model_and_settings, run_calibration, text_bar
from headkv_mm.commands.option_values import budget, whole_number

if TYPE_CHECKING:
    from headkv_mm.compiled_tables import CompiledTables

HELP = "compile tables of head weights and thresholds by roll-outs, for compilerkv (experimental)"
EXAMPLE = "headkv-mm calibrate tables path/to/model --text book.txt --output tables.json"
_SETTINGS = (
    "texts",
    "validation",
    "length",
    "following",
    "budgets",
    "trials",
    "entropy_bins",
    "perplexity_bins",
    "least",
    "price",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    add_common_arguments(parser, texts=48)
    for name, least, text in (
        ("validation", 0, "texts to compare the tables with none on, beside --texts (default: 12)"),
        ("following", 2, "last tokens of a text, which the model predicts after the eviction (default: 64)"),
        ("trials", 2, "roll-outs of every text and budget (default: 8)"),
        ("entropy-bins", 1, "bins of the attention's entropy (default: 20)"),
        ("perplexity-bins", 1, "bins of the prompt's perplexity (default: 4)"),
        ("least", 1, "trials that an action must have before it can be chosen (default: 8)"),
    ):
        parser.add_argument(f"--{name}", type=whole_number(least), metavar="N", help=text)
    parser.add_argument(
        "--budgets", type=budget, nargs="+", metavar="SHARE", help="shares to keep (default: 1/4 1/8 1/16)"
    )
    parser.add_argument(
        "--price", type=float, metavar="NATS", help="loss that holding the whole budget is worth (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Compile, write the tables, print what they are worth."""
    from headkv_mm.compiled_tables import save_compiled_tables

    return run_calibration(args, _measure, save_compiled_tables, _show)


def _measure(args: argparse.Namespace, partial: Path) -> CompiledTables:
    from headkv_mm.calibration.tables import TablesCalibration, calibrate_tables

    pipe, text, given = model_and_settings(args, _SETTINGS)
    if "budgets" in given:
        given["budgets"] = tuple(given["budgets"])
    calibration = TablesCalibration(**given)
    with text_bar(args, calibration.texts + calibration.validation) as on_text:
        return calibrate_tables(pipe.model, pipe.tokenizer, calibration, text=text, partial=partial, on_text=on_text)


def _show(tables: CompiledTables) -> None:
    """The weights, the thresholds of prompts of unknown perplexity, and the losses on texts kept apart."""
    print("layer  head weights")
    for layer, row in enumerate(tables.head_weights):
        print(f"{layer:>5}  {' '.join(f'{weight:.2f}' for weight in row)}")
    cells = [cell for layer in tables.gate for row in layer for cell in row]
    changed = sum(cell > 0 for cell in cells)
    print(f"\nthresholds: {changed} of {len(cells)} cells; the others let everything through\n")
    if tables.validation:
        print("budget  full cache  identity  these tables  entries held")
    for means in tables.validation:
        print(
            f"{means['budget']:>6.4g}  {means['full']:>10.4f}  {means['identity']:>8.4f}  {means['compiled']:>12.4f}  "
            f"{means['held']:>11.1%}"
        )
    print(f"\nmean losses in nats on texts kept apart; {tables.texts} texts were read to compile")
