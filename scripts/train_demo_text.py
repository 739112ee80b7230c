#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the embedded language model from nothing; the documents are generated on the fly."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from headkv_mm.demo.checkpoint import load_checkpoint, save_checkpoint
from headkv_mm.demo.documents import TASKS
from headkv_mm.demo.muon import Muon
from headkv_mm.demo.text_evaluation import unseen_documents, would_answer
from headkv_mm.demo.text_model import build_untrained_text_model
from headkv_mm.demo.text_schedule import LEAST_STEPS, STAGES, learning_rate_factor, next_batch
from headkv_mm.demo.text_training import VALUE_WEIGHT, TextBatch

MUON_RATE, ADAM_RATE = 0.02, 3e-3
PEEK_SEED = 100


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/train_demo_text.py --output language",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="number of training tokens")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting weights and of the data")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file; OUTPUT.checkpoint.safetensors if left out")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.0, help="time between checkpoints")
    parser.add_argument("--peek-tokens", type=int, default=800_000, help="training tokens between two scores")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        arguments.checkpoint = arguments.output.with_name(arguments.output.name + ".checkpoint.safetensors")
    for name in ("tokens", "threads", "peek_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.resume and not arguments.checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint at {arguments.checkpoint}")
    return arguments


def losses(model: Any, batch: TextBatch) -> tuple[torch.Tensor, float]:
    """The weighted loss to train on, and the mean loss on the values of the answers, both in nats."""
    logits = model(batch.inputs, position_ids=batch.positions, use_cache=False).logits
    each = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    values = each.detach()[weights == VALUE_WEIGHT]
    return (each * weights).sum() / weights.sum(), float(values.mean())


def peek(model: Any, length: int) -> dict[str, float]:
    """Share of unseen documents that would be answered, by task."""
    return {task: round(would_answer(model, unseen_documents(task, length, 16, PEEK_SEED)), 2) for task in TASKS}


def train(arguments: argparse.Namespace) -> None:
    """Train, report and save."""
    torch.set_num_threads(arguments.threads)
    model = build_untrained_text_model(arguments.seed).train()
    blocks = {id(item) for item in model.model.layers.parameters() if item.ndim == 2}
    muon = Muon([item for item in model.parameters() if id(item) in blocks], lr=MUON_RATE)
    adam = torch.optim.AdamW(
        [item for item in model.parameters() if id(item) not in blocks],
        lr=ADAM_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": muon, "adam": adam}
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "stage": 0, "since": 0, "loss": None, "seconds": 0.0}
    if arguments.resume:
        progress = load_checkpoint(arguments.checkpoint, model, optimizers)
    last_saved = time.monotonic()
    while progress["tokens"] < arguments.tokens:
        started = time.monotonic()
        factor = learning_rate_factor(progress["step"], progress["tokens"], arguments.tokens)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_RATE * factor, ADAM_RATE * factor
        batch = next_batch(arguments.seed, progress["step"], progress["stage"])
        loss, value_loss = losses(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        before = progress["tokens"]
        progress["step"] += 1
        progress["since"] += 1
        progress["tokens"] += batch.inputs.numel()
        progress["loss"] = value_loss if progress["loss"] is None else 0.95 * progress["loss"] + 0.05 * value_loss
        progress["seconds"] += time.monotonic() - started
        if progress["step"] % 25 == 0:
            print(
                f"step {progress['step']} stage {progress['stage']} tokens {progress['tokens'] / 1e6:.2f}M "
                f"seconds {progress['seconds']:.0f} loss on values {progress['loss']:.3f}",
                flush=True,
            )
        stage = progress["stage"]
        if stage < len(STAGES) and progress["since"] >= LEAST_STEPS and progress["loss"] < STAGES[stage].enough:
            progress |= {"stage": stage + 1, "since": 0, "loss": None}
            print(f"stage {stage + 1}", flush=True)
        if progress["tokens"] // arguments.peek_tokens != before // arguments.peek_tokens:
            for length in (512, 2048):
                print(f"{length} tokens: {peek(model, length)}", flush=True)
        if time.monotonic() - last_saved > 60 * arguments.checkpoint_minutes:
            save_checkpoint(arguments.checkpoint, model, optimizers, progress)
            last_saved = time.monotonic()
    save_checkpoint(arguments.checkpoint, model, optimizers, progress)


def main() -> int:
    """Run the script."""
    train(parse_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
