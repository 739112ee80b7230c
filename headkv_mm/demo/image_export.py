# SPDX-License-Identifier: Apache-2.0
"""Final evaluation and export of the embedded text-to-image model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headkv_mm.demo.export import new_model_folder, write_model, write_texts
from headkv_mm.demo.image_training import SamplingSettings, generate_and_score
from headkv_mm.demo.parsing import share_all_right
from headkv_mm.demo.patches import patch_dictionary
from headkv_mm.demo.scenes import unseen_scenes
from headkv_mm.demo.tokenizer import build_tokenizer
from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration

CANDIDATES = (
    SamplingSettings(1.0, 0, 1.0),
    SamplingSettings(0.7, 50, 1.0),
    SamplingSettings(0.5, 50, 1.0),
    SamplingSettings(0.7, 50, 1.5),
    SamplingSettings(0.7, 50, 2.0),
    SamplingSettings(0.5, 50, 2.0),
    SamplingSettings(0.7, 50, 3.0),
)
SELECTION_SEED, REPORT_SEED = 2, 3


def evaluate_settings(
    model: LlamaGenForConditionalGeneration, captions: int = 256, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Choose sampling settings on some unseen captions and measure them on others.

    Args:
        model: trained model.
        captions: number of unseen captions to measure on; half as many others serve to choose.
        report: called with one line per result.

    Returns:
        JSON data: the chosen settings, their score on the reporting captions, and all scores on the selection captions.
    """
    scenes = unseen_scenes(max(1, captions // 2), SELECTION_SEED)
    table = []
    for settings in CANDIDATES:
        _, scores = generate_and_score(model, scenes, settings, seed=10_000)
        table.append({**settings.as_dict(), "all_right": share_all_right(scores)})
        report(f"selection captions: {table[-1]}")
    best = _best(table)
    selection = {"captions": len(scenes), "results": table}
    scenes = unseen_scenes(captions, REPORT_SEED)
    measured = []
    for settings in dict.fromkeys((CANDIDATES[best], SamplingSettings())):
        _, scores = generate_and_score(model, scenes, settings, seed=20_000)
        parts = {
            name: sum(getattr(item, name) for item in scores) / len(scores)
            for name in ("background", "place", "shape", "colour", "same_colour")
        }
        measured.append({**settings.as_dict(), "all_right": share_all_right(scores), **parts})
        report(f"reporting captions: {measured[-1]}")
    return {
        "chosen": CANDIDATES[best].as_dict(),
        "report": {"captions": captions, "results": measured},
        "selection": selection,
    }


def _best(table: list[dict[str, float]]) -> int:
    """Index of the best settings.

    Guidance, which doubles the work, must win by more than one image in a hundred. Of equals the coldest is taken:
    every draw that is not the best one is a chance to go wrong.
    """
    top = max(entry["all_right"] for entry in table)
    near = [index for index, entry in enumerate(table) if entry["all_right"] >= top - 0.01]

    def rank(index: int) -> tuple[bool, float, float]:
        entry = table[index]
        return entry["guidance_scale"] > 1, -entry["all_right"], entry["temperature"]

    return min(near, key=rank)


def export_model(
    model: LlamaGenForConditionalGeneration, folder: Path, evaluation: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write a folder that `AutoModelForMultimodalLM` and `AutoTokenizer` can load: weights in float16, card, scores.

    The folder is complete from the moment it appears; an older one is replaced.

    Args:
        model: trained model; it is not changed.
        folder: where to write.
        evaluation: what `evaluate_settings` returned.
        training: JSON data about the training run.
    """
    with new_model_folder(folder) as new:
        half = LlamaGenForConditionalGeneration(model.config).to(torch.float16)
        half.load_state_dict(model.state_dict())
        chosen = evaluation["chosen"]
        half.generation_config.update(do_sample=True, **{**chosen, "top_k": int(chosen["top_k"])})
        half.generation_config._from_model_config = False  # chosen here, not copied from the configuration
        write_model(half, new)
        build_tokenizer(patch_dictionary().size).save_pretrained(new)
        write_texts(new, model_card(model, evaluation, training), evaluation, training)


def model_card(model: LlamaGenForConditionalGeneration, evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    """The folder's README with the measured numbers."""

    def row(result: dict[str, Any]) -> str:
        return (
            f"| {result['temperature']:g} | {int(result['top_k'])} | {result['guidance_scale']:g} "
            f"| {100 * result['all_right']:.1f} % |"
        )

    def rows(part: str) -> str:
        return "\n".join(row(result) for result in evaluation[part]["results"])

    text = model.config.get_text_config()
    size = (
        f"{text.num_hidden_layers} blocks, width {text.hidden_size}, {text.num_attention_heads} heads, "
        f"{sum(item.numel() for item in model.parameters()) / 1e6:.2f} M parameters"
    )
    header = "| temperature | top-k | guidance | all right |\n|---|---|---|---|"
    return f"""---
license: apache-2.0
pipeline_tag: text-to-image
---
# Coloured shapes: a small autoregressive text-to-image model

A Llama-style transformer ({size}) that draws 64x64-pixel scenes of one to
three flat shapes as 16x16 image tokens, in the manner of LlamaGen (arXiv:2406.06525) with two-axis rotary positions.
Every token is a 4x4-pixel patch from an exact dictionary of 369 patches, so there is no learned image tokeniser.

The weights are stored in float16 and load as float32 unless you ask for another dtype.

It exists to test and to show KV cache compression for image generation on any computer. It knows nothing else.

## Captions

`red circle top-left, same ring bottom, same cross right on white`

Colour, shape and place for every object, then the background. Objects called `same` share one colour that the caption
leaves free: only the image drawn so far says which. Colours: red, green, blue, yellow, purple, orange. Shapes: circle,
square, triangle, cross, ring. Places: top-left, top, top-right, left, center, right, bottom-left, bottom, bottom-right.
Backgrounds: white, black, gray.

## Training

From nothing on {training["images"]:,} generated scenes with `scripts/train_demo_image.py`: {training["step"]:,} steps,
{training["seconds"] / 60:.0f} minutes, {training["processes"]} process(es) on {training["device"]}, seed
{training["seed"]}. One caption in 16, chosen by a hash of its content, was never trained on.

The last {training["forgetful_images"]:,} scenes were trained with dropout of past entries: beyond a recent window
every head lost a random part of the image drawn so far. The model stands a compressed cache better for it; without that
phase it draws as well with its full cache and much worse with any compressed one.

## Scores

Share of images in which every object, its colour, shape and place, and the background are right, read by an exact
parser. Full cache, sampling.

{evaluation["report"]["captions"]} unseen captions, the default settings first:

{header}
{rows("report")}

{evaluation["selection"]["captions"]} other unseen captions, on which the defaults were chosen:

{header}
{rows("selection")}
"""
