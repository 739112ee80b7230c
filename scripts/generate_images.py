# SPDX-License-Identifier: Apache-2.0
"""Draw many prompts on several processes, each with its own accelerator.

    accelerate launch --num_processes 4 scripts/generate_images.py prompts.txt --output images --kv-budget 1/6

One prompt per line. An image depends on its prompt and seed only, so the files are the same for any number of
processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

import headkv_mm
from headkv_mm.commands.option_values import budget, option, whole_number
from headkv_mm.commands.output_folder import OutputFolder


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="text file with one prompt per line")
    parser.add_argument("--model", help="model folder (default: the embedded model)")
    parser.add_argument("--kv-compression", default="headkv", metavar="METHOD", help="none for the full cache")
    parser.add_argument("--kv-budget", type=budget, metavar="BUDGET", help="such as 1/6, 64 or 512MiB")
    parser.add_argument("--kv-option", type=option, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--num-images", type=whole_number(1), default=1, metavar="N", help="images per prompt")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="S", help="image j of a prompt has S + j")
    parser.add_argument("--batch-size", type=whole_number(1), metavar="N", help="images drawn together")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="strength of guidance, 1 for none")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw this process's share; the first process writes run.json with everybody's reports."""
    args = build_parser().parse_args(argv)
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} has no prompts: write one per line")
    state = PartialState(cpu=args.cpu)
    compressed = args.kv_compression != "none"
    pipe = headkv_mm.pipeline(
        "text-to-image",
        args.model,
        device=state.device,
        kv_compression=args.kv_compression,
        kv_budget=args.kv_budget if compressed else None,
        kv_options=dict(args.kv_option),
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        guidance_scale=args.guidance_scale,
    )
    pipe.check_prompts(prompts)
    records: list[dict[str, Any]] = []
    with OutputFolder(args.output) as folder:
        with state.split_between_processes(list(enumerate(prompts))) as share:
            for (number, prompt), output in zip(share, pipe([text for _, text in share]) if share else []):
                files = [f"{number:05d}-seed{seed}.png" for seed in output.seeds]
                for image, file in zip(output.images, files):
                    image.save(folder.new(file))
                records.append({"number": number, "prompt": prompt, "files": files, **output.report.to_dict()})
        everybody = sorted(gather_object(records), key=lambda record: record["number"])
        if state.is_main_process:
            folder.write_json("run.json", {"processes": state.num_processes, "prompts": everybody})
    if state.is_main_process:
        print(json.dumps({"prompts": len(everybody), "output": str(args.output)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
