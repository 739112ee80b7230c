# SPDX-License-Identifier: Apache-2.0
"""What the kinds of `headkv-mm calibrate` have in common: options, the output file, the bar, going on after a break."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.option_values import whole_number

INTERRUPTED = 130
MOST_POSITIONS = 1024  # of a text, unless asked for
_SUFFIX = ".json"


def add_common_arguments(parser: argparse.ArgumentParser, *, texts: int) -> None:
    """Add the options that every kind has; `texts` is the default in the help."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="model folder or id (default: the embedded language model)"
    )
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the table to write")
    parser.add_argument(
        "--text", metavar="FILE", help="read pieces of this text (.txt, .md, .html, .pdf) instead of generated ones"
    )
    parser.add_argument("--texts", type=whole_number(1), metavar="N", help=f"texts to read (default: {texts})")
    parser.add_argument(
        "--length",
        type=whole_number(1),
        metavar="N",
        help=f"tokens of a text (default: {MOST_POSITIONS}, or what the model has room for)",
    )
    parser.add_argument("--seed", type=whole_number(0), metavar="S", help="chooses the texts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print what FILE.json holds instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run_calibration(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], Any],
    save: Callable[[Any, Path], None],
    show: Callable[[Any], None],
) -> int:
    """Measure, write the table, print it.

    Args:
        args: of the command line.
        measure: makes the table; what is done so far it keeps in the file that it is given.
        save: writes the table.
        show: prints it.

    Returns:
        The exit status.

    Raises:
        ValueError: for an output of another kind, and whatever `measure` raises.
    """
    path = Path(args.output)
    if path.suffix.lower() != _SUFFIX or path.is_dir():
        raise ValueError(f"--output {args.output} must be the name of a {_SUFFIX} file, such as table{_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        table = measure(args, partial)
    except KeyboardInterrupt:
        kept = f"; {partial} keeps what is done, and the same command goes on from there" if partial.exists() else ""
        print(f"\nheadkv-mm: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    save(table, path)
    if args.json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        show(table)
        print(path)
    return 0


def model_and_settings(args: argparse.Namespace, names: Sequence[str]) -> tuple[Any, str | None, dict[str, Any]]:
    """The text-generation pipeline, the text to read if one was given, and the settings that were given.

    A length that was not asked for is what the model has room for, if that is less than usual.
    """
    import headkv_mm
    from headkv_mm.pipelines.reading import read_document

    text = None if args.text is None else read_document(args.text)
    device: dict[str, Any] = {} if args.device is None else {"device": usable_device(args.device)}
    pipe = headkv_mm.pipeline("text-generation", args.model, **device)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    positions = getattr(pipe.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if "length" not in given and positions is not None:
        given["length"] = min(MOST_POSITIONS, positions)
    return pipe, text, given


@contextmanager
def text_bar(args: argparse.Namespace, total: int, unit: str = "text") -> Iterator[Callable[[int], object]]:
    """A progress bar; yields what is to be called with the number of texts done."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit, disable=args.no_progress or not sys.stderr.isatty()) as bar:
        yield lambda done: bar.update(done - bar.n)
