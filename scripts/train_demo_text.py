#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the embedded language model from nothing; the documents are generated on the fly."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headkv_mm.demo.checkpoint import load_checkpoint, save_checkpoint
from headkv_mm.demo.documents import TASKS
from headkv_mm.demo.export import check_output, round_to_float16
from headkv_mm.demo.muon import Muon
from headkv_mm.demo.text_evaluation import evaluate_text_model, unseen_documents, would_answer
from headkv_mm.demo.text_export import export_text_model, write_scores
from headkv_mm.demo.text_model import build_untrained_text_model
from headkv_mm.demo.text_schedule import STAGES, learning_rate_factor, next_batch
from headkv_mm.demo.text_training import batch_losses, forgetful_mask

MUON_RATE, ADAM_RATE = 0.02, 3e-3
FORGETFUL_LENGTH = 1024  # longer rows would cost twice the time with a mask
PEEK_SEED, PEEK_DOCUMENTS = 100, 16
PEEK_LENGTHS = (512, 1536)


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/train_demo_text.py --output language",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--tokens", type=int, default=9_700_000, help="number of training tokens")
    parser.add_argument(
        "--forgetful-tokens",
        type=int,
        default=2_300_000,
        help="training tokens after those, with dropout of past entries, so that the model stands a compressed cache",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting weights and of the data")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file; OUTPUT.checkpoint.safetensors if left out")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.0, help="time between checkpoints")
    parser.add_argument("--peek-tokens", type=int, default=1_000_000, help="training tokens between two scores")
    parser.add_argument("--evaluation-documents", type=int, default=256, help="documents for every length and seed")
    parser.add_argument("--note", default="", help="a sentence about this run for the model's card")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the model in OUTPUT again")
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        arguments.checkpoint = arguments.output.with_name(arguments.output.name + ".checkpoint.safetensors")
    for name in ("tokens", "threads", "peek_tokens", "evaluation_documents"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.forgetful_tokens < 0:
        parser.error("--forgetful-tokens must not be negative")
    if arguments.resume and not arguments.checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint at {arguments.checkpoint}")
    if arguments.evaluate_only and not (arguments.output / "evaluation.json").is_file():
        parser.error(f"--evaluate-only: there is no model in {arguments.output}")
    try:
        check_output(arguments.output)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def peek(model: Any) -> None:
    """Print the share of unseen documents that would be answered, by task."""
    for length in PEEK_LENGTHS:
        scores = {
            task: would_answer(model, unseen_documents(task, length, PEEK_DOCUMENTS, PEEK_SEED)) for task in TASKS
        }
        say(f"  {length} tokens: " + ", ".join(f"{task} {score:.2f}" for task, score in scores.items()))


def train(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train, report and save; returns the model and what happened."""
    model = build_untrained_text_model(arguments.seed).train()
    blocks = {id(item) for item in model.model.layers.parameters() if item.ndim == 2}
    muon = Muon([item for item in model.parameters() if id(item) in blocks], lr=MUON_RATE)
    rest = [item for item in model.parameters() if id(item) not in blocks]
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": muon, "adam": adam}
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads

    progress: dict[str, Any] = {"step": 0, "tokens": 0, "stage": 0, "since": 0, "loss": None, "seconds": 0.0}
    if arguments.resume:
        progress = load_checkpoint(arguments.checkpoint, model, optimizers)
    last_saved = time.monotonic()
    while progress["tokens"] < arguments.tokens + arguments.forgetful_tokens:
        started = time.monotonic()
        step, before = progress["step"], progress["tokens"]
        factor = learning_rate_factor(step, before, arguments.tokens, arguments.forgetful_tokens)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_RATE * factor, ADAM_RATE * factor
        batch = next_batch(arguments.seed, step, progress["stage"])
        mask = None
        if before >= arguments.tokens and step % 2 and batch.inputs.shape[1] <= FORGETFUL_LENGTH:
            generator = torch.Generator().manual_seed(arguments.seed + 1_000_003 * step)
            mask = forgetful_mask(batch, heads, kv_heads, generator)
        loss, value_loss = batch_losses(model, batch, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        smooth = progress["loss"]
        if progress["stage"] == 0 or batch.spare.any():  # later stages are not judged by the repeats among them
            smooth = value_loss if smooth is None else 0.95 * smooth + 0.05 * value_loss
        progress |= {"step": step + 1, "tokens": before + batch.inputs.numel(), "loss": smooth}
        progress["since"] += 1
        progress["seconds"] += time.monotonic() - started
        if progress["step"] % 25 == 0:
            say(
                f"step {step + 1}, stage {progress['stage']}, {progress['tokens'] / 1e6:.2f} M tokens, "
                f"{progress['seconds']:.0f} s, loss on values {smooth:.3f}"
            )
        stage = progress["stage"]
        if stage < len(STAGES) and STAGES[stage].is_over(progress["since"], smooth):
            progress |= {"stage": stage + 1, "since": 0, "loss": None}
        if progress["tokens"] // arguments.peek_tokens != before // arguments.peek_tokens:
            peek(model)
        if time.monotonic() - last_saved > 60 * arguments.checkpoint_minutes:
            save_checkpoint(arguments.checkpoint, model, optimizers, progress)
            last_saved = time.monotonic()
    save_checkpoint(arguments.checkpoint, model, optimizers, progress)
    done = {key: progress[key] for key in ("step", "tokens", "seconds", "stage")}
    settings = {key: getattr(arguments, key) for key in ("forgetful_tokens", "seed", "threads", "note")}
    return model, {**done, **settings}


def main() -> int:
    """Run the script."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate_only:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32).eval()
        training = json.loads((arguments.output / "evaluation.json").read_text(encoding="utf-8"))["training"]
        scores = evaluate_text_model(model, arguments.evaluation_documents, report=say)
        write_scores(arguments.output, scores, training)
        return 0
    model, training = train(arguments)
    model.eval()
    round_to_float16(model)
    scores = evaluate_text_model(model, arguments.evaluation_documents, report=say)
    export_text_model(model, arguments.output, scores, training)
    say(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
