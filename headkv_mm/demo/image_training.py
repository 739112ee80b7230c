# SPDX-License-Identifier: Apache-2.0
"""Batches, loss, learning rate and scoring for training the embedded text-to-image model."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional

from headkv_mm.demo.image_model import word_ids
from headkv_mm.demo.parsing import SceneScore, score
from headkv_mm.demo.patches import patch_dictionary, scene_tokens
from headkv_mm.demo.scenes import GRID_SIZE, Scene, caption, held_out, sample_scene
from headkv_mm.demo.tokenizer import BOI, BOS, MAX_PROMPT_LENGTH, NULL, build_tokenizer, prompt_words
from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration

CAPTION_DROPOUT = 0.08
WARM_UP_STEPS = 50
LAST_RATE = 0.02  # share of the learning rate that is left at the end
FORGETFUL_RATE = 0.4  # share of the learning rate at which the forgetful phase begins


@dataclass(frozen=True)
class Batch:
    """Prompts of one length with their images.

    Attributes:
        prompts: int64 [B, L], without padding.
        images: int64 [B, 256], image codes.
        with_caption: False if the prompts are the unconditional one.
    """

    prompts: torch.Tensor
    images: torch.Tensor
    with_caption: bool


def training_batches(seed: int, count: int) -> list[Batch]:
    """Draw training scenes and sort them by prompt length, so that no prompt needs padding.

    Args:
        seed: the same seed gives the same batches.
        count: number of scenes; held-out scenes are never among them.

    Returns:
        At most four batches: one per prompt length.
    """
    rng = random.Random(seed)
    ids = word_ids()
    groups: dict[int, tuple[list[list[int]], list[np.ndarray[tuple[int], np.dtype[np.int64]]]]] = {}
    drawn = 0
    while drawn < count:
        scene = sample_scene(rng)
        if held_out(scene):
            continue
        words = [BOS, NULL, BOI] if rng.random() < CAPTION_DROPOUT else prompt_words(scene)
        prompts, images = groups.setdefault(len(words), ([], []))
        prompts.append([ids[word] for word in words])
        images.append(scene_tokens(scene))
        drawn += 1
    return [
        Batch(torch.tensor(prompts), torch.from_numpy(np.stack(images)), with_caption=length > 3)
        for length, (prompts, images) in groups.items()
    ]


def forgetful_mask(batch: Batch, heads: int, generator: torch.Generator) -> torch.Tensor:
    """A causal mask in which heads have lost part of the image that is not near: dropout on past entries.

    Every head of every image keeps a random share of the past, from a tenth to everything, beyond a recent window of
    one to three rows; a quarter of the images keep all. What is lost stays lost for later queries. The prompt stays.

    Returns:
        bool [B, heads, T, T], True where a query may look; T = prompt + image - 1.
    """
    size, length = len(batch.images), batch.prompts.shape[1]
    total = length + batch.images.shape[1] - 1
    share = 0.1 + 0.9 * torch.rand(size, heads, 1, generator=generator)
    share[torch.rand(size, generator=generator) < 0.25] = 1.0
    kept = torch.rand(size, heads, total, generator=generator) < share  # [B, H, T]
    kept[..., :length] = True
    window = torch.randint(GRID_SIZE + 2, 3 * GRID_SIZE, (size, heads, 1, 1), generator=generator)
    age = torch.arange(total)[:, None] - torch.arange(total)[None, :]  # [T, T], query minus key
    return (age >= 0) & (kept[:, :, None, :] | (age < window))


def batch_loss(model: LlamaGenForConditionalGeneration, batch: Batch, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy per image token, in nats.

    The prompts take the last slots before the image, where `generate` has them too. `mask` is None for causal
    attention, or what `forgetful_mask` gives.
    """
    length, steps = batch.prompts.shape[1], batch.images.shape[1]
    first = MAX_PROMPT_LENGTH - length
    positions = torch.arange(first, MAX_PROMPT_LENGTH + steps - 1, device=batch.prompts.device)[None]
    inputs = torch.cat((batch.prompts, batch.images[:, :-1]), dim=1)
    logits = model(
        input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=steps
    ).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch.images.flatten())


def learning_rate_factor(step: int, images: int, total_images: int, forgetful_images: int = 0) -> float:
    """Warm-up over the first steps, constant up to half of the images, then a straight line down.

    The forgetful phase that follows begins again, lower, and goes down in a straight line too.
    """
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    if forgetful_images and images >= total_images:
        return FORGETFUL_RATE * max(LAST_RATE, 1 - (images - total_images) / forgetful_images)
    done = images / total_images
    return warm_up * (1.0 if done < 0.5 else max(LAST_RATE, (1 - done) / 0.5))


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of `generate` that change what an image looks like."""

    temperature: float = 1.0
    top_k: int = 0
    guidance_scale: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """The settings by name."""
        return asdict(self)


@torch.no_grad()
def generate_and_score(
    model: LlamaGenForConditionalGeneration, scenes: list[Scene], settings: SamplingSettings, seed: int = 0
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[SceneScore]]:
    """Generate an image for every scene's caption and score it.

    Args:
        model: the model, on any device.
        scenes: what to ask for.
        settings: how to draw.
        seed: image i uses seed + i.

    Returns:
        Images uint8 [N, 64, 64, 3] and one score per image.
    """
    tokenizer = build_tokenizer(patch_dictionary().size)
    prompts = tokenizer([caption(scene) for scene in scenes], padding="max_length", return_tensors="pt")
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    tokens = model.generate(
        prompts["input_ids"].to(device),
        prompts["attention_mask"].to(device),
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        guidance_scale=settings.guidance_scale,
        seeds=[seed + index for index in range(len(scenes))],
    )
    images = model.decode_image_tokens(tokens).cpu().numpy()
    model.train(was_training)
    return images, [score(scene, image) for scene, image in zip(scenes, images, strict=True)]
