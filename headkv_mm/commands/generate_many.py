# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm generate --prompts`: a folder of images, by one process or many."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv_mm.batch.jobs import Job
    from headkv_mm.batch.prompts import PromptList
    from headkv_mm.batch.records import Drawn
    from headkv_mm.batch.run import Outcome
    from headkv_mm.batch.settings import BatchSettings
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

SOME_FAILED, INTERRUPTED = 1, 130
_SHOWN = 20  # failures that are named on the terminal; failed.jsonl has all


def run_many(args: argparse.Namespace, build: Callable[..., TextToImagePipeline]) -> int:
    """Draw a list of prompts; what is there already is not drawn again.

    Args:
        args: of `headkv-mm generate`.
        build: makes the pipeline of the command line on a device.

    Returns:
        0, or 1 on the main process if a line could not be read or drawn.

    Raises:
        ValueError, OSError: in one line, for everything the user can mend.
    """
    from headkv_mm.batch.folder import ImageFolder
    from headkv_mm.batch.processes import everywhere, from_main, start_processes
    from headkv_mm.batch.prompts import read_prompts
    from headkv_mm.batch.run import draw_folder
    from headkv_mm.commands.batch_memory import batch_that_fits, device_memory
    from headkv_mm.commands.compile_kernels import compile_cpu_kernels

    for name in ("compare", "maps"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for single prompts: leave it out, or give a PROMPT instead of --prompts")
    _refuse_many_on_one_map(args.device_map)
    state = start_processes(args.device)
    tell = _teller(state.is_main_process)
    prompts = from_main(state, lambda: read_prompts(args.prompts_file))
    for line in prompts.bad[:_SHOWN]:
        tell(f"{prompts.source}, line {line.line}: {line.error}")
    folder = ImageFolder(args.output)
    from_main(state, folder.open)
    try:
        device = args.device if state.num_processes == 1 else str(state.device)
        pipe = everywhere(state, lambda: build(args, device=device))
        if pipe.device.type == "cpu" and pipe.settings()["kv_compression"]:
            from_main(state, lambda: compile_cpu_kernels((pipe.model.dtype,)))  # one does it for all
        outcome = draw_folder(
            state,
            folder,
            prompts,
            settings=_settings(pipe, args),
            batch_size=args.batch_size,
            default_batch_size=lambda: batch_that_fits(pipe, prompts.prompts, device_memory(pipe.device)),
            num_images=args.num_images,
            seed=args.seed,
            check=_check(pipe),
            draw=_drawer(pipe, args.scale or 1),
            show_progress=not args.no_progress and sys.stderr.isatty(),
            tell=tell,
        )
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on where it was")
        return INTERRUPTED
    finally:
        folder.abandon()
    if state.num_processes > 1:
        state.destroy_process_group()
    if not state.is_main_process:
        return 0
    _report(outcome, prompts, args)
    return SOME_FAILED if outcome.failures else 0


def _refuse_many_on_one_map(device_map: str | None) -> None:
    if device_map is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--device-map spreads one model over all accelerators of a machine: start one process per machine"
        )


def _teller(is_main: bool) -> Callable[[str], None]:
    """A function that tells the user something, on the main process only."""
    return lambda text: print(f"headkv-mm: {text}", file=sys.stderr, flush=True) if is_main else None


def _settings(pipe: TextToImagePipeline, args: argparse.Namespace) -> Callable[[int], BatchSettings]:
    """The settings of the folder for a batch size, which raise an error if the budget is too small for it."""
    import torch

    from headkv_mm.batch.settings import BatchSettings
    from headkv_mm.commands.versions import versions
    from headkv_mm.fingerprint import fingerprint
    from headkv_mm.memory import plan_memory

    own = pipe.settings()
    print_of_model = fingerprint(pipe.model)
    made_with: dict[str, Any] = {"versions": versions(), "device": pipe.device.type}
    if pipe.device.type == "cpu":
        made_with["threads"] = torch.get_num_threads()  # sums are split among them, and rounded in another order

    def settings(batch_size: int) -> BatchSettings:
        if own["kv_compression"]:  # a budget in bytes is one for all rows
            rows = batch_size if own["sampling"]["guidance_scale"] == 1 else 2 * batch_size
            plan_memory(pipe.model, own["kv_compression"], rows=rows, image_grid=pipe.image_grid)
        values = {
            "model": print_of_model,
            "dtype": str(pipe.model.dtype).removeprefix("torch."),
            **own,
            "text_encoder": _name(args.text_encoder),
            "image_decoder": _name(args.image_decoder),
            "num_images": args.num_images,
            "batch_size": batch_size,
            "scale": args.scale or 1,
        }
        return BatchSettings(values, made_with)

    return settings


def _name(folder: str | None) -> str | None:
    """Its last part, so that a moved folder is the same one."""
    return folder and os.path.basename(os.path.normpath(folder))


def _check(pipe: TextToImagePipeline) -> Callable[[Job], None]:
    """Whether the model can read a prompt."""

    def check(job: Job) -> None:
        if job.prompt.label is None:
            pipe.check_prompts([job.prompt.prompt or ""])
        else:
            pipe.check_class_labels([job.prompt.label])

    return check


def _drawer(pipe: TextToImagePipeline, scale: int) -> Callable[[Sequence[Job]], tuple[list[Drawn], dict[str, Any]]]:
    """Draws some images together."""
    from headkv_mm.batch.records import Drawn
    from headkv_mm.pipelines.outputs import merge_reports

    def draw(jobs: Sequence[Job]) -> tuple[list[Drawn], dict[str, Any]]:
        wanted: dict[str, Any] = {"seed": [job.seed for job in jobs], "num_images": 1, "batch_size": len(jobs)}
        labels = [job.prompt.label for job in jobs if job.prompt.label is not None]  # all of them, or none
        if labels:
            outputs = pipe(class_labels=labels, **wanted)
        else:
            outputs = pipe([job.prompt.prompt for job in jobs], **wanted)
        report = merge_reports([outputs[0].report])  # all are of one run
        details = {
            "images_together": report.images,
            "kv_bytes": report.nbytes,
            "kv_bytes_peak": report.nbytes_peak,
            "kv_bytes_full": report.nbytes_full,
            "local_heads": report.local_share,
        }
        drawn = [
            Drawn(job, _png(output.images[0], scale), {"read_as": output.prompts[0], **details})
            for job, output in zip(jobs, outputs, strict=True)
        ]
        return drawn, {"seconds": round(report.seconds, 4), "tokens_per_second": round(report.tokens_per_second, 1)}

    return draw


def _png(image: Any, scale: int) -> bytes:
    from headkv_mm.commands.pictures import enlarged

    buffer = io.BytesIO()
    enlarged(image, scale).save(buffer, format="PNG")
    return buffer.getvalue()


def _report(outcome: Outcome, prompts: PromptList, args: argparse.Namespace) -> None:
    """Say what is there, and what is not."""
    unread = len(prompts.bad)
    failures = [item for item in outcome.failures if item.id is not None]
    if args.json:
        found = {
            "output": str(args.output),
            "images": outcome.images,
            "drawn": outcome.drawn,
            "failed": [item.to_dict() for item in outcome.failures],
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for item in failures[:_SHOWN]:
        print(f"headkv-mm: {prompts.source}, line {item.line} ({item.id}): {item.error}", file=sys.stderr)
    print(f"{_counted(outcome.images, 'image')} in {args.output}, {outcome.drawn} of them drawn now")
    if outcome.failures:
        counts = ((unread, "line", "read"), (len(failures), "prompt", "drawn"))
        what = " and ".join(f"{_counted(count, noun)} could not be {done}" for count, noun, done in counts if count)
        print(f"{what}: see {os.path.join(args.output, 'failed.jsonl')}; the same command tries them again")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
