#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the embedded text-to-image model from nothing; the data are generated on the fly."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from headkv_mm.demo.checkpoint import load_checkpoint, save_checkpoint
from headkv_mm.demo.export import check_output, round_to_float16
from headkv_mm.demo.image_export import evaluate_settings, export_model
from headkv_mm.demo.image_model import build_untrained_model
from headkv_mm.demo.image_training import (
    SamplingSettings,
    batch_loss,
    forgetful_mask,
    generate_and_score,
    learning_rate_factor,
    training_batches,
)
from headkv_mm.demo.muon import Muon
from headkv_mm.demo.scenes import unseen_scenes
from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration

MUON_RATE, ADAM_RATE = 0.02, 3e-3
PEEK_SEED, PEEK_CAPTIONS = 1, 64


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/train_demo_image.py --output text_to_image --processes 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--images", type=int, default=80_000, help="number of training images")
    parser.add_argument(
        "--forgetful-images",
        type=int,
        default=24_000,
        help="training images after those, with dropout of past entries, so that the model stands a compressed cache",
    )
    parser.add_argument("--layers", type=int, default=5, help="blocks of the model")
    parser.add_argument("--processes", type=int, default=2, help="CPU processes of one thread each")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, over all processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting weights and of the data")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with --processes 1")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file; OUTPUT.checkpoint.safetensors if left out")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--peek-images", type=int, default=8_000, help="training images between two scores")
    parser.add_argument("--evaluation-captions", type=int, default=256, help="unseen captions of the final score")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        arguments.checkpoint = arguments.output.with_name(arguments.output.name + ".checkpoint.safetensors")
    for name in ("images", "layers", "processes", "batch_size", "peek_images", "evaluation_captions"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.forgetful_images < 0:
        parser.error("--forgetful-images must not be negative")
    if arguments.batch_size % arguments.processes:
        parser.error("--batch-size must be a multiple of --processes")
    if arguments.device != "cpu" and arguments.processes > 1:
        parser.error("use --processes 1 with a GPU")
    if arguments.resume and not arguments.checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint at {arguments.checkpoint}")
    try:
        check_output(arguments.output)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def average_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """Replace the gradients by their mean over all processes, in one message."""
    gradients = [item.grad for item in parameters if item.grad is not None]
    flat = torch.cat([item.flatten() for item in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, mean in zip(gradients, torch.split(flat, [item.numel() for item in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def peek(model: LlamaGenForConditionalGeneration, rank: int, processes: int) -> float:
    """Share of unseen captions whose image is all right; every process draws its part."""
    scenes = unseen_scenes(PEEK_CAPTIONS, PEEK_SEED)[rank::processes]
    _, scores = generate_and_score(model, scenes, SamplingSettings(), seed=1000 * rank)
    counts = torch.tensor([sum(item.all_right for item in scores), len(scores)], dtype=torch.float64)
    if processes > 1:
        dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def train(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """Train in one process; process 0 reports, saves and exports."""
    processes, device = arguments.processes, torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1 if processes > 1 else torch.get_num_threads())
    if processes > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    model = build_untrained_model(arguments.seed, arguments.layers).to(device).train()
    parameters = list(model.parameters())
    blocks = {id(item) for item in model.model.language_model.layers.parameters() if item.ndim == 2}
    muon = Muon([item for item in parameters if id(item) in blocks], lr=MUON_RATE)
    rest = [item for item in parameters if id(item) not in blocks]
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": muon, "adam": adam}

    step, images, seconds, smooth = 0, 0, 0.0, float("nan")
    if arguments.resume:
        progress = load_checkpoint(arguments.checkpoint, model, optimizers)
        step, images, seconds, smooth = (progress[key] for key in ("step", "images", "seconds", "loss"))
    started = last_saved = time.monotonic()
    interval = 0.5 if sys.stderr.isatty() else 20
    total = arguments.images + arguments.forgetful_images
    heads = model.config.get_text_config().num_attention_heads
    bar = tqdm(total=total, initial=images, unit="img", mininterval=interval, disable=rank > 0)
    share = arguments.batch_size // processes
    while images < total:
        factor = learning_rate_factor(step, images, arguments.images, arguments.forgetful_images)
        forgetful = torch.Generator().manual_seed(step * processes + rank) if images >= arguments.images else None
        adam.param_groups[0]["lr"], muon.param_groups[0]["lr"] = ADAM_RATE * factor, MUON_RATE * factor
        captioned = captioned_images = 0.0
        for batch in training_batches((arguments.seed * 10**9 + step) * processes + rank, share):
            moved = type(batch)(batch.prompts.to(device), batch.images.to(device), batch.with_caption)
            mask = None if forgetful is None else forgetful_mask(batch, heads, forgetful).to(device)
            loss = batch_loss(model, moved, mask)
            (loss * (len(batch.images) / share)).backward()
            if batch.with_caption:
                captioned += loss.item() * len(batch.images)
                captioned_images += len(batch.images)
        if processes > 1:
            average_gradients(parameters, processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        step, images = step + 1, images + arguments.batch_size
        if captioned_images:
            current = captioned / captioned_images
            smooth = current if smooth != smooth else 0.96 * smooth + 0.04 * current
        bar.update(arguments.batch_size)
        bar.set_postfix(loss=f"{smooth:.4f}", rate=f"{factor:.2f}", refresh=False)

        elapsed = seconds + time.monotonic() - started
        if images // arguments.peek_images > (images - arguments.batch_size) // arguments.peek_images:
            right = peek(model, rank, processes)
            if rank == 0:
                bar.write(f"{images} images, {elapsed:.0f} s: loss {smooth:.4f}, all right {right:.3f}", sys.stderr)
        if rank == 0 and time.monotonic() - last_saved > 60 * arguments.checkpoint_minutes:
            state = {"step": step, "images": images, "seconds": elapsed, "loss": smooth}
            save_checkpoint(arguments.checkpoint, model, optimizers, state)
            last_saved = time.monotonic()
    bar.close()
    elapsed = seconds + time.monotonic() - started
    if rank == 0:
        state = {"step": step, "images": images, "seconds": elapsed, "loss": smooth}
        save_checkpoint(arguments.checkpoint, model, optimizers, state)
    if processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        round_to_float16(model.eval())
        evaluation = evaluate_settings(
            model, arguments.evaluation_captions, lambda line: print(line, file=sys.stderr, flush=True)
        )
        run = {"seed": arguments.seed, "processes": processes, "device": device.type}
        run["forgetful_images"] = arguments.forgetful_images
        export_model(model, arguments.output, evaluation, {**state, **run})
        print(f"wrote {arguments.output}", file=sys.stderr)


def main() -> None:
    """Start the processes."""
    arguments = parse_arguments()
    if arguments.processes == 1:
        train(0, arguments, port=0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(train, (arguments, port), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
