# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm convert`: other people's checkpoints as transformers folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headkv_mm.commands.option_values import whole_number

if TYPE_CHECKING:
    from headkv_mm.llamagen.convert import Conversion

HELP = "convert a published checkpoint into a model folder"
EXAMPLE = "headkv-mm convert llamagen c2i_B_384.pt --vq vq_ds16_c2i.pt --output llamagen-b-384"
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("model", choices=["llamagen"], help="what kind of checkpoint it is")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the transformer's file: .pt or .safetensors")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument(
        "--vq", metavar="CHECKPOINT", help="the image tokenizer's file; without it there are tokens but no pictures"
    )
    parser.add_argument(
        "--kind", choices=["class", "text"], help="what images are drawn from (default: as the file says)"
    )
    parser.add_argument(
        "--image-size",
        type=whole_number(1),
        metavar="PIXELS",
        help="side of the images, such as 384 (default: from the file or its name)",
    )
    parser.add_argument(
        "--heads", type=whole_number(1), metavar="N", help="attention heads, for widths that were not published"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the transformer's weights (default: as they are)")
    parser.add_argument("--json", action="store_true", help="print what was converted as JSON")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Convert and say what came out."""
    import torch

    from headkv_mm.llamagen.convert import convert_llamagen

    with _bar(show=not args.no_progress and sys.stderr.isatty()) as progress:
        done = convert_llamagen(
            args.checkpoint,
            args.output,
            vq=args.vq,
            kind=args.kind,
            image_size=args.image_size,
            heads=args.heads,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            progress=progress,
        )
    print(json.dumps(done.to_dict(), indent=2) if args.json else _text(done))
    return 0


def _text(done: Conversion) -> str:
    """What was converted, for people."""
    size = "no decoder" if done.pixels is None else f"{done.pixels}x{done.pixels} pixels"
    lines = [
        f"{done.kind}-conditional LlamaGen: {done.layers} layers of width {done.width}, {done.heads} heads, "
        f"{done.grid}x{done.grid} image tokens, {size}",
        f"{done.parameters / 1e6:.1f} million weights, the transformer's in {done.dtype}",
    ]
    if done.left_out:
        lines.append(f"left out, for training only: {', '.join(done.left_out)}")
    return "\n".join([*lines, done.folder])


@contextmanager
def _bar(*, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over layers on stderr, if it is to be shown."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(unit="layer", desc="converting", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
