# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm heads`: which heads of a model matter, measured once, or for one text as `headkv` sees it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.heads_online import ONLINE_OPTIONS, add_online_arguments, run_online
from headkv_mm.commands.option_values import whole_number
from headkv_mm.commands.output_folder import OutputFolder

if TYPE_CHECKING:
    from headkv_mm.calibration import Calibration
    from headkv_mm.head_tables import HeadTable

HELP = "measure which heads of a model find answers, for headkv-r2 and compresskv; or draw the head types of a text"
EXAMPLE = (
    "headkv-mm heads path/to/model --output heads.json\n"
    "  headkv-mm heads --online --document report.pdf --output types.json"
)
SUFFIX = ".json"
INTERRUPTED = 130
_CALIBRATION_OPTIONS = ("examples", "length", "seed", "max_new_tokens", "kind")
_MOST_POSITIONS = 1024  # of a prompt, unless asked for
_NAMED_HEADS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="model folder or id (default: the embedded language model)"
    )
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    parser.add_argument(
        "--output", required=True, metavar="FILE.json", help="what to write; a picture, FILE.png, comes beside it"
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--kind",
        choices=("r2", "srh"),
        help="what counts: r2 for headkv-r2 (default), srh for compresskv",
    )
    measuring.add_argument(
        "--examples",
        type=whole_number(1),
        metavar="N",
        help="prompts; only those that the model answers right count (default: 100)",
    )
    measuring.add_argument(
        "--length",
        type=whole_number(1),
        metavar="N",
        help=f"tokens of a prompt (default: {_MOST_POSITIONS}, or what the model has room for)",
    )
    measuring.add_argument("--seed", type=whole_number(0), metavar="S", help="chooses the prompts (default: 0)")
    measuring.add_argument("--max-new-tokens", type=whole_number(1), metavar="N", help="longest answer (default: 50)")
    add_online_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what FILE.json holds instead of a table")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure or look, write the two files, print a table."""
    path = _output(args.output)
    if args.online:
        _refuse(args, _CALIBRATION_OPTIONS, "is for measuring: leave --online out")
        run_online(args, path)
        return 0
    _refuse(args, ONLINE_OPTIONS, "is for looking at one text: add --online")
    partial = path.with_name(f".{path.name}.partial")
    try:
        table = _measure(args, partial)
    except KeyboardInterrupt:
        kept = f"; {partial} keeps what is done, and the same command goes on from there" if partial.exists() else ""
        print(f"\nheadkv-mm: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    _write(table, path)
    if args.json:
        print(path.read_text(encoding="utf-8"), end="")
    else:
        _print_table(table, path)
    return 0


def _output(text: str) -> Path:
    """The file to write.

    Raises:
        ValueError: for a name of another kind, or a folder.
    """
    path = Path(text)
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"--output {text} must be the name of a {SUFFIX} file, such as heads{SUFFIX}")
    if path.is_dir():
        raise ValueError(f"--output {text} is a folder: name a file in it")
    return path


def _refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Refuse options of the other way to use the command.

    Raises:
        ValueError: naming them.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, [])]
    if given:
        raise ValueError(f"{', '.join(given)} {reason}")


def _measure(args: argparse.Namespace, partial: Path) -> HeadTable:
    """The calibration with a bar; what is done is kept in `partial`."""
    from tqdm.auto import tqdm

    import headkv_mm
    from headkv_mm.calibration import calibrate

    settings: dict[str, Any] = {} if args.device is None else {"device": usable_device(args.device)}
    pipe = headkv_mm.pipeline("text-generation", args.model, **settings)
    calibration = _calibration(args, pipe.model)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shown = not args.no_progress and sys.stderr.isatty()
    with tqdm(total=calibration.examples, unit="prompt", disable=not shown) as bar:

        def on_example(done: int, answered: int) -> None:
            bar.set_postfix_str(f"{answered} answered right", refresh=False)
            bar.update(done - bar.n)

        return calibrate(pipe.model, pipe.tokenizer, calibration, partial=partial, on_example=on_example)


def _calibration(args: argparse.Namespace, model: Any) -> Calibration:
    """The settings; the length is cut to what the model has room for unless it is asked for."""
    from headkv_mm.calibration import Calibration

    given = {name: getattr(args, name) for name in _CALIBRATION_OPTIONS if getattr(args, name) is not None}
    calibration = Calibration(**given)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if "length" not in given and positions is not None:
        length = max(1, min(calibration.length, positions - calibration.max_new_tokens))
        calibration = Calibration(**{**given, "length": length})
    return calibration


def _write(table: HeadTable, path: Path) -> None:
    """Both files, or none."""
    from headkv_mm.head_tables import save_head_table
    from headkv_mm.plots_heads import head_table_map

    with OutputFolder(path.parent) as folder:
        save_head_table(table, folder.new(path.name))
        head_table_map(table).savefig(folder.new(path.with_suffix(".png").name))


def _print_table(table: HeadTable, path: Path) -> None:
    """How many prompts count, the scores by layer, and the heads that matter most."""
    scores = table.kv_scores()
    print(f"{table.answered} of {table.examples} prompts were answered right and count")
    print()
    print("layer  share  its KV heads (% of all scores)")
    for layer, row in enumerate(scores.tolist()):
        heads = "  ".join(f"{100 * score:5.1f}" for score in row)
        print(f"{layer:>5}  {sum(row):>5.1%}  {heads}")
    flat = scores.flatten()
    best = flat.argsort(descending=True, stable=True)[:_NAMED_HEADS].tolist()
    names = ", ".join(f"layer {index // table.kv_heads} head {index % table.kv_heads}" for index in best)
    print()
    print(f"most: {names} ({float(flat[best].sum()):.0%} of all scores)")
    print(path)
    print(path.with_suffix(".png"))
