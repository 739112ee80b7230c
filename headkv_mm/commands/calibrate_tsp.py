# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate tsp`: after which layer of a model most tokens of a prompt may be left behind, for `fastkv`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.option_values import whole_number

if TYPE_CHECKING:
    from headkv_mm.tsp_tables import TSPTable

HELP = "measure after which layer fastkv may leave tokens behind"
EXAMPLE = "headkv-mm calibrate tsp path/to/model --output tsp.json"
SUFFIX = ".json"
INTERRUPTED = 130
_SETTINGS = ("texts", "length", "ratio", "tolerance", "seed")
_MOST_POSITIONS = 1024  # of a text, unless asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the kind."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="model folder or id (default: the embedded language model)"
    )
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the table to write")
    parser.add_argument(
        "--text", metavar="FILE", help="read pieces of this text (.txt, .md, .html, .pdf) instead of generated ones"
    )
    parser.add_argument("--texts", type=whole_number(1), metavar="N", help="texts to read (default: 16)")
    parser.add_argument(
        "--length",
        type=whole_number(1),
        metavar="N",
        help=f"tokens of a text (default: {_MOST_POSITIONS}, or what the model has room for)",
    )
    parser.add_argument("--ratio", type=float, metavar="R", help="share of the tokens that go on (default: 0.2)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="D",
        help="relative distance of the last hidden state that is good enough (default: 0.05)",
    )
    parser.add_argument("--seed", type=whole_number(0), metavar="S", help="chooses the texts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print what FILE.json holds instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure, write the table, print it."""
    from headkv_mm.tsp_tables import save_tsp_table

    path = Path(args.output)
    if path.suffix.lower() != SUFFIX or path.is_dir():
        raise ValueError(f"--output {args.output} must be the name of a {SUFFIX} file, such as tsp{SUFFIX}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        table = _measure(args, partial)
    except KeyboardInterrupt:
        kept = f"; {partial} keeps what is done, and the same command goes on from there" if partial.exists() else ""
        print(f"\nheadkv-mm: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    save_tsp_table(table, path)
    if args.json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        _print_table(table, path)
    return 0


def _measure(args: argparse.Namespace, partial: Path) -> TSPTable:
    """The calibration with a bar; what is done is kept in `partial`."""
    from tqdm.auto import tqdm

    import headkv_mm
    from headkv_mm.calibration.tsp import TSPCalibration, calibrate_tsp
    from headkv_mm.pipelines.reading import read_document

    text = None if args.text is None else read_document(args.text)
    settings: dict[str, Any] = {} if args.device is None else {"device": usable_device(args.device)}
    pipe = headkv_mm.pipeline("text-generation", args.model, **settings)
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    positions = getattr(pipe.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if "length" not in given and positions is not None:
        given["length"] = min(_MOST_POSITIONS, positions)
    calibration = TSPCalibration(**given)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shown = not args.no_progress and sys.stderr.isatty()
    with tqdm(total=calibration.texts, unit="text", disable=not shown) as bar:
        return calibrate_tsp(
            pipe.model,
            pipe.tokenizer,
            calibration,
            text=text,
            partial=partial,
            on_text=lambda done: bar.update(done - bar.n),
        )


def _print_table(table: TSPTable, path: Path) -> None:
    """The distances by layer, and the layer that was chosen."""
    print("layer  distance of the last hidden state")
    for layer, distance in enumerate(table.distances):
        print(f"{layer:>5}  {distance:.4f}{'  *' if layer == table.layer else ''}")
    print()
    print(
        f"* the first within {table.tolerance:g} of the full run, with {table.ratio:.0%} of the tokens going on; "
        f"mean of {table.texts} texts"
    )
    print(path)
