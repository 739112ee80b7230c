# SPDX-License-Identifier: Apache-2.0
"""The command line: `headkv-mm generate | ask | heads | calibrate | plan | convert | methods | doctor | evaluate`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from headkv_mm.commands import ask, calibrate, convert, doctor, generate, heads, methods, plan
from headkv_mm.evaluation import command as evaluate

PROGRAM = "headkv-mm"
COMMANDS = {
    "generate": generate,
    "ask": ask,
    "heads": heads,
    "calibrate": calibrate,
    "plan": plan,
    "convert": convert,
    "methods": methods,
    "doctor": doctor,
    "evaluate": evaluate,
}
USER_ERROR, INTERRUPTED = 2, 130


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        subcommand = self.prog.removeprefix(PROGRAM).strip()
        hint = f"{PROGRAM} {subcommand} --help" if subcommand else f"{PROGRAM} --help"
        self.exit(USER_ERROR, f"{PROGRAM}: error: {' '.join(message.split())} (see {hint})\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.run(args)` runs what was chosen."""
    from headkv_mm import __version__

    parser = OneLineParser(
        prog=PROGRAM, description="KV-cache compression head by head, for image and language models."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        _add(commands, name, module.HELP, module.EXAMPLE, module.add_arguments, module.run)
    return parser


def _add(
    commands: argparse._SubParsersAction[OneLineParser],
    name: str,
    description: str,
    example: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> None:
    parser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0, or 2 after an error of the user, 130 after Ctrl-C, or what the subcommand says.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse's way to end after --help or an error
        return int(stop.code or 0)
    try:
        _quiet_transformers()
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; the interpreter must not complain when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    return status


def _one_line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    lines = str(error).strip().splitlines()
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return "not enough memory: use a smaller --batch-size"
    return lines[0] if lines else type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    """Whether an accelerator had no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _quiet_transformers() -> None:
    """No loading bars and no advice of transformers between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
