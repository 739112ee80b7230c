# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm plan`: what fits into memory, from a configuration alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.option_values import budget, grid, whole_number
from headkv_mm.pipelines.defaults import METHOD

if TYPE_CHECKING:
    from headkv_mm.planned_model import PlannedModel
    from headkv_mm.workload import Workload

HELP = "plan memory: weights, cache with and without compression, the largest batch that fits"
EXAMPLE = "headkv-mm plan --model llamagen-xl-384 --memory 24GiB --batch 64"
FULL = "none"
_IMAGE_BUDGETS, _TEXT_BUDGETS = ("1/4", "1/6", "1/8"), ("1/2", "1/4", "1/8")
_SMALL = 0.1
"""A full cache below this share of everything is not worth compressing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("--model", metavar="MODEL", help="a shape (see --list), a folder, a config.json, or a hub id")
    parser.add_argument("--list", action="store_true", help="list the built-in shapes of published models")
    parser.add_argument("--memory", type=memory, metavar="BYTES", help="memory of the device, such as 24GiB")
    parser.add_argument("--batch", type=whole_number(1), metavar="N", help="images or texts that shall fit together")
    parser.add_argument(
        "--tokens", type=whole_number(1), metavar="N", help="tokens of a text, prompt and answer together"
    )
    parser.add_argument("--chunk", type=whole_number(1), metavar="N", help="read prompts in chunks (default: whole)")
    parser.add_argument("--prompt", type=whole_number(1), metavar="N", help="prompt tokens of an image")
    parser.add_argument("--grid", type=grid, metavar="HxW", help="image tokens, for models that draw several sizes")
    parser.add_argument(
        "--guidance",
        action=argparse.BooleanOptionalAction,
        help="classifier-free guidance: two rows per image (default: as the model is used)",
    )
    parser.add_argument(
        "--kv-compression",
        metavar="METHOD",
        help=f"see headkv-mm methods (default: {METHOD})",
    )
    parser.add_argument(
        "--kv-budget", type=budget, metavar="BUDGET", help="see headkv-mm generate (default: several are shown)"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def memory(text: str) -> int:
    """Bytes: "24GiB" or "512MB"."""
    from headkv_mm.budgets import budget_bytes

    try:
        found = budget_bytes(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write bytes such as 24GiB or 512MiB")
    return found


def run(args: argparse.Namespace) -> int:
    """Print the plan, or the list of shapes."""
    if args.list:
        return _list(args.json)
    if args.model is None or args.memory is None:
        raise ValueError("plan needs --model and --memory, for example: " + EXAMPLE)
    from headkv_mm.planned_model import planned_model

    model = planned_model(args.model, size=args.grid, text=args.tokens is not None)
    if model.grid is None and args.tokens is None:
        raise ValueError(f"{args.model} is a language model: say how long a text is with --tokens N")
    record = plan(model, args)
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        _print(record)
    return 0


def plan(model: PlannedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known, as JSON types."""
    from headkv_mm.budgets import parse_budget
    from headkv_mm.fits import budget_for
    from headkv_mm.planned_model import dtype_of
    from headkv_mm.workload import Workload

    work = Workload.of(
        model.config,
        guided=model.guided if args.guidance is None else args.guidance,
        condition=args.prompt or model.condition,
        image_grid=model.grid,
        tokens=args.tokens,
        chunk=args.chunk,
        dtype=dtype_of(args.dtype),
    )
    method = args.kv_compression or METHOD
    usual = _TEXT_BUDGETS if model.grid is None else _IMAGE_BUDGETS
    budgets = [(str(args.kv_budget), args.kv_budget)] if args.kv_budget else [(b, parse_budget(b)) for b in usual]
    rows = [_row(work, FULL, "", None, args)]
    if method != FULL:
        rows += [_row(work, method, label, value, args) for label, value in budgets]
    text = work.config.get_text_config(decoder=True)
    full = rows[0]["needed"]
    record: dict[str, Any] = {
        "model": model.title,
        "layers": text.num_hidden_layers,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "dtype": str(work.dtype).removeprefix("torch."),
        "image_grid": asdict(work.image_grid) if work.image_grid is not None else None,
        "tokens": work.tokens,
        "guided": work.guided,
        "condition": work.condition,
        "memory": args.memory,
        "weights": work.weights,
        "batch": args.batch or 1,
        "methods": rows,
        "full_cache_share": full["cache_full"] / full["total"],
        "notes": list(model.notes),
    }
    if args.batch is not None and method != FULL:
        found = budget_for(work, method, batch=args.batch, memory=args.memory)
        record["budget_that_fits"] = found
        whole = work.image_grid.tokens if work.image_grid is not None else work.tokens
        record["budget_that_fits_share"] = found if found is None or isinstance(found, float) else found / (whole or 1)
    if method != FULL:
        record["notes"] += _worth(record)
    return record


def _row(work: Workload, method: str, label: str, value: Any, args: argparse.Namespace) -> dict[str, Any]:
    from headkv_mm.fits import largest_batch
    from headkv_mm.workload import memory_needed

    needed = memory_needed(work, method, batch=args.batch or 1, budget=value)
    return {
        "method": method,
        "budget": label,
        "largest_batch": largest_batch(work, method, budget=value, memory=args.memory),
        "needed": {**asdict(needed), "total": needed.total},
        "fits": needed.total <= args.memory,
    }


def _worth(record: dict[str, Any]) -> list[str]:
    """Whether compression pays, where it does not."""
    share, notes = record["full_cache_share"], []
    what = _what(record, record["batch"])
    if share < _SMALL:
        notes.append(
            f"the full cache is only {100 * share:.1f} % of what {what} need{'s' if record['batch'] == 1 else ''}: at "
            "this batch compression saves little"
        )
    full, best = record["methods"][0]["largest_batch"], max(row["largest_batch"] for row in record["methods"][1:])
    if 0 < best <= 1.25 * full:
        notes.append("the largest batch hardly grows: compression does not pay here")
    if record["methods"][0]["largest_batch"] == 0 and best == 0:
        notes.append("not even one fits: a smaller dtype, or more devices (device_map) would be needed")
    return notes


def _list(as_json: bool) -> int:
    from headkv_mm.shapes import shapes

    found = [
        {
            "name": shape.name,
            "title": shape.title,
            "kind": shape.kind,
            "parameters": shape.parameters,
            "image_grid": asdict(shape.grid) if shape.grid is not None else None,
            "guided": shape.guided,
            "condition": shape.condition,
            "source": shape.source,
            "unconfirmed": shape.unconfirmed,
        }
        for shape in shapes().values()
    ]
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for shape in shapes().values():
        tokens = f"{shape.grid.tokens} tokens" if shape.grid is not None else "text"
        mark = "  (sizes not all confirmed)" if shape.unconfirmed else ""
        print(f"{shape.name:<20} {shape.parameters / 1e9:6.2f} B  {tokens:<12} {shape.title}{mark}")
    return 0


def _what(record: dict[str, Any], count: int) -> str:
    noun = "text" if record["image_grid"] is None else "image"
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _print(record: dict[str, Any]) -> None:
    grid_, batch = record["image_grid"], record["batch"]
    print(record["model"])
    size = f"{record['layers']} layers, {record['kv_heads']} KV heads of {record['head_dim']}, {record['dtype']}"
    if grid_ is None:
        print(f"{size}; {record['tokens']} tokens per text")
    else:
        newline = f", rows of {grid_['row_stride']}" if grid_["row_stride"] != grid_["width"] else ""
        before = f" after {grid_['start']} of a preview" if grid_["start"] else ""
        rows = "2 rows per image (guidance)" if record["guided"] else "1 row per image"
        print(f"{size}; {grid_['height']} x {grid_['width']} tokens{newline}{before}, {rows}")
        print(f"prompt of {record['condition']} token{'' if record['condition'] == 1 else 's'}")
    print(f"memory {gib(record['memory'])}, weights {gib(record['weights'])}\n")
    heads = ["cache", f"cache of {_what(record, batch)}", "activations", "all together", "fits", "largest batch"]
    lines = [
        [
            "full" if row["method"] == FULL else f"{row['method']} {row['budget']}",
            gib(row["needed"]["cache"]),
            gib(row["needed"]["activations"]),
            gib(row["needed"]["total"]),
            "yes" if row["fits"] else "no",
            str(row["largest_batch"]),
        ]
        for row in record["methods"]
    ]
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    for line in [heads, *lines]:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
    if "budget_that_fits" in record:
        print(f"\n{_fitting(record)}")
    for note in record["notes"]:
        print(f"note: {note}")


def _fitting(record: dict[str, Any]) -> str:
    found, what = record["budget_that_fits"], _what(record, record["batch"])
    method = record["methods"][-1]["method"]
    fit = "fits" if record["batch"] == 1 else "fit"
    if found is None:
        return f"{what} would not fit with any budget of {method}"
    if found == 1.0 and isinstance(found, float):
        return f"{what} {fit} without compression"
    share = record["budget_that_fits_share"]
    return f"{what} {fit} with {method} and a budget of at most {found} entries per KV head ({100 * share:.1f} %)"


def gib(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.1f} MiB"
