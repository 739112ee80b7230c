# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm generate`: images from prompts, with pictures of what the cache did."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.compile_kernels import compile_cpu_kernels
from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.option_values import budget, class_labels, image_rows, option, whole_number
from headkv_mm.commands.output_folder import OutputFolder
from headkv_mm.commands.pictures import enlarged
from headkv_mm.pipelines.defaults import METHOD

if TYPE_CHECKING:
    from headkv_mm.pipelines import ImageOutput
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

HELP = "draw images from prompts"
EXAMPLE = 'headkv-mm generate "a red circle top left and a blue square bottom right" --num-images 4 --compare --maps'
FULL = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; several prompts are several images")
    parser.add_argument(
        "--prompts",
        dest="prompts_file",
        metavar="FILE",
        help="draw a whole list, on as many processes as were started: .txt with a prompt per line, .jsonl with "
        "id, prompt (or class) and seed, or - for standard input; the same command goes on after an interruption",
    )
    parser.add_argument(
        "--class-labels",
        type=class_labels,
        metavar="N,N,...",
        help="draw these classes, such as 207,360, with a model that draws classes",
    )
    parser.add_argument("--model", metavar="FOLDER", help="model folder (default: the embedded model)")
    parser.add_argument(
        "--text-encoder", metavar="FOLDER", help="T5 encoder with tokenizer, for models that read its features"
    )
    parser.add_argument(
        "--image-decoder", metavar="FOLDER", help="diffusers VQModel, for models without a decoder of their own"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    place.add_argument("--device-map", metavar="MAP", help='"auto": spread a model over several accelerators')
    compression = parser.add_argument_group("KV cache")
    compression.add_argument(
        "--kv-compression",
        default=METHOD,
        metavar="METHOD",
        help=f"see headkv-mm methods; none for the full cache (default: {METHOD})",
    )
    compression.add_argument(
        "--kv-budget",
        type=budget,
        metavar="BUDGET",
        help="share of the image's entries kept per KV head (1/6), entries per KV head (64), or bytes (512MiB); "
        "the prompt is always kept and comes on top (default: 1/6)",
    )
    compression.add_argument(
        "--kv-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method; repeatable",
    )
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--num-images", type=whole_number(1), default=1, metavar="N", help="images per prompt (default: 1)"
    )
    drawing.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="S",
        help="seed of a prompt's first image; image j has S + j (default: 0)",
    )
    drawing.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="images drawn together (default: those of a prompt; of a list what fits the memory)",
    )
    drawing.add_argument("--guidance-scale", type=float, metavar="G", help="strength of guidance, 1 for none")
    drawing.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    drawing.add_argument("--temperature", type=float, metavar="T", help="divides the scores before drawing")
    drawing.add_argument("--top-k", type=whole_number(0), metavar="K", help="draw from the K best tokens, 0 for all")
    drawing.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set with this probability")
    drawing.add_argument(
        "--grid",
        type=image_rows,
        metavar="HxW[xROW]",
        help="image tokens, for models that draw several sizes; ROW counts the newline too (Lumina-mGPT: W + 1)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", default="output", metavar="DIR", help="where the files go (default: output)")
    output.add_argument(
        "--scale",
        type=whole_number(1),
        metavar="N",
        help="enlarge images N times (default: small images to about 512 pixels, those of a list not at all)",
    )
    output.add_argument("--compare", action="store_true", help="also draw with the full cache, side by side")
    output.add_argument("--maps", action="store_true", help="also draw the head map and the tokens every head kept")
    output.add_argument("--json", action="store_true", help="print what run.json holds instead of a table")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


@dataclass(frozen=True)
class Variant:
    """One way to keep the cache, and what came out of it.

    Attributes:
        name: file-name part: "full" or the method.
        outputs: one per prompt.
    """

    name: str
    outputs: list[ImageOutput]


def run(args: argparse.Namespace) -> int:
    """Draw, write the files, print a table."""
    if bool(args.prompts) + (args.prompts_file is not None) + (args.class_labels is not None) != 1:
        raise ValueError(
            "give either a PROMPT (one or more), or --prompts FILE, or --class-labels (see headkv-mm generate --help)"
        )
    if args.prompts_file is not None:
        from headkv_mm.commands.generate_many import run_many

        return run_many(args, _pipeline)
    if args.compare and args.kv_compression == FULL:
        raise ValueError(
            "--compare needs a compression to compare with the full cache: leave --kv-compression none out"
        )
    with OutputFolder(args.output) as folder:
        pipe = _pipeline(args, device=args.device)
        if args.class_labels is not None:
            args.prompts = pipe.check_class_labels(args.class_labels)
        variants = _draw(pipe, args)
        record = _write(folder, variants, pipe, args)
    if args.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print_table(variants, record, folder)
    return 0


def _pipeline(args: argparse.Namespace, *, device: str | None) -> TextToImagePipeline:
    """The pipeline with all settings of the command line, on a device."""
    import headkv_mm
    from headkv_mm.image_grid import ImageGrid

    settings: dict[str, Any] = {
        "kv_compression": args.kv_compression,
        "kv_budget": None if args.kv_compression == FULL else args.kv_budget,
        "kv_options": dict(args.kv_option),
        "num_images": args.num_images,
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "batch_size": args.batch_size,
        "keep_tokens": args.maps,
        "image_grid": None if args.grid is None else ImageGrid(*args.grid),
        "progress": args.prompts_file is None and not args.no_progress and sys.stderr.isatty(),
    }
    for beside in ("text_encoder", "image_decoder"):
        if getattr(args, beside) is not None:
            settings[beside] = getattr(args, beside)
    if args.device_map is not None:
        settings["device_map"] = args.device_map
    elif device is not None:
        settings["device"] = usable_device(device)
    pipe: TextToImagePipeline = headkv_mm.pipeline("text-to-image", args.model, **settings)
    return pipe


def _draw(pipe: TextToImagePipeline, args: argparse.Namespace) -> list[Variant]:
    """Draw all prompts: with the full cache first if both are asked for."""
    pipe.check_prompts(args.prompts)
    variants = []
    if args.compare:
        variants.append(Variant("full", pipe(args.prompts, kv_compression=FULL)))
    if args.kv_compression != FULL and pipe.device.type == "cpu":
        compile_cpu_kernels((pipe.model.dtype,))  # not part of the tokens per second
    name = "full" if args.kv_compression == FULL else args.kv_compression
    variants.append(Variant(name, pipe(args.prompts)))
    return variants


def _write(
    folder: OutputFolder, variants: list[Variant], pipe: TextToImagePipeline, args: argparse.Namespace
) -> dict[str, Any]:
    """Write images, pictures and run.json; returns what run.json holds."""
    from headkv_mm.commands.versions import versions

    files: list[dict[str, Any]] = []
    for variant in variants:
        mark = f"-{variant.name}" if len(variants) > 1 else ""
        for number, (prompt, output) in enumerate(zip(args.prompts, variant.outputs)):
            for image, seed in zip(output.images, output.seeds):
                name = f"{number:02d}-{_slug(prompt)}-seed{seed}{mark}.png"
                enlarged(image, args.scale).save(folder.new(name))
                files.append(
                    {"file": name, "prompt": prompt, "read_as": output.prompts[0], "seed": seed, "cache": variant.name}
                )
    pictures = _pictures(folder, variants, pipe, args)
    record = {
        "versions": versions(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("command", "run", "debug")},
        "device": str(pipe.device),
        "images": files,
        "pictures": pictures,
        "reports": [
            {"cache": variant.name, "prompt": prompt, **output.report.to_dict()}
            for variant in variants
            for prompt, output in zip(args.prompts, variant.outputs)
        ],
    }
    folder.write_json("run.json", record)
    return record


def _pictures(
    folder: OutputFolder, variants: list[Variant], pipe: TextToImagePipeline, args: argparse.Namespace
) -> list[str]:
    """The comparison and the maps of every prompt's first image, or of every image for the comparison."""
    from headkv_mm import plots
    from headkv_mm.pipelines.outputs import format_budget, format_bytes

    names: list[str] = []
    for number, prompt in enumerate(args.prompts):
        stem = f"{number:02d}-{_slug(prompt)}"
        outputs = [variant.outputs[number] for variant in variants]
        if args.compare:
            for index, seed in enumerate(outputs[0].seeds):
                columns = [(_label(output), output.images[index], _facts(output)) for output in outputs]
                names.append(f"{stem}-seed{seed}-compare.png")
                plots.compare_picture(columns, f"{prompt} (seed {seed})").save(folder.new(names[-1]))
        report, kept = outputs[-1].report, outputs[-1].kept_tokens
        if args.maps and kept is not None:
            if report.caches:
                title = (
                    f"{report.method} {format_budget(report.budget)}: "
                    f"{format_bytes(report.nbytes)} of {format_bytes(report.nbytes_full)}"
                )
                names.append(f"{stem}-heads.png")
                plots.head_map(report.caches[0], title).savefig(folder.new(names[-1]))
            names.append(f"{stem}-seed{outputs[-1].seeds[0]}-kept.png")
            figure = plots.kept_token_map(kept[0], outputs[-1].images[0], pipe.image_grid)
            figure.savefig(folder.new(names[-1]))
    return names


def _label(output: ImageOutput) -> str:
    from headkv_mm.pipelines.outputs import format_budget

    report = output.report
    return "full cache" if report.method == FULL else f"{report.method} {format_budget(report.budget)}"


def _facts(output: ImageOutput) -> list[str]:
    """The lines under a picture."""
    from headkv_mm.pipelines.outputs import format_bytes

    report = output.report
    share = "" if report.method == FULL else f" ({report.ratio:.1%} of full)"
    lines = [f"{format_bytes(report.nbytes)} held{share}", f"{report.tokens_per_second:.0f} tokens/s"]
    return [*lines, f"{report.images} images together"] if report.images > 1 else lines


def _print_table(variants: list[Variant], record: dict[str, Any], folder: OutputFolder) -> None:
    """Where the files lie, and bytes and speed of every variant."""
    from headkv_mm.pipelines.outputs import format_bytes, merge_reports

    rows = [("cache", "held", "full", "share", "peak", "tokens/s", "local heads")]
    for variant in variants:
        report = merge_reports([output.report for output in variant.outputs])
        share = "-" if report.local_share is None else f"{report.local_share:.0%}"
        rows.append(
            (
                _label(variant.outputs[0]),
                format_bytes(report.nbytes),
                format_bytes(report.nbytes_full),
                f"{report.ratio:.1%}",
                format_bytes(report.nbytes_peak),
                f"{report.tokens_per_second:.0f}",
                share,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells))
    print()
    for name in [*(item["file"] for item in record["images"]), *record["pictures"], "run.json"]:
        print(folder.path / name)


def _slug(prompt: str) -> str:
    """The prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "image"
