# SPDX-License-Identifier: Apache-2.0
"""From published checkpoints to one transformers folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headkv_mm.llamagen.convert.checkpoint import Checkpoint, read_checkpoint
from headkv_mm.llamagen.convert.transformer import TransformerSizes, grid_in, take_transformer
from headkv_mm.llamagen.convert.vq import take_vq, vq_config

_SIZE_IN_NAME = re.compile(r"_(256|384|512)(?!\d)")
_DOWNSAMPLE = 16  # of the published models
DRAWING = {
    "class": {"guidance_scale": 4.0, "top_k": 2000, "temperature": 1.0, "do_sample": True},
    "text": {"guidance_scale": 7.5, "top_k": 1000, "temperature": 1.0, "do_sample": True},
}
"""The defaults of the sampling scripts that were published with the checkpoints."""


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        folder: where it lies.
        kind: "class" or "text".
        layers, width, heads, kv_heads: of the transformer.
        grid: image tokens per side.
        pixels: pixels per side; None without a decoder.
        parameters: of transformer and decoder.
        dtype: of the transformer; the decoder is in float32.
        left_out: tensors that only training needs.
    """

    folder: str
    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    grid: int
    pixels: int | None
    parameters: int
    dtype: str
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "left_out": list(self.left_out)}


def convert_llamagen(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vq: str | os.PathLike[str] | None = None,
    kind: str | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write published LlamaGen checkpoints (arXiv:2406.06525) as a folder that transformers and our pipeline load.

    Args:
        checkpoint: the transformer's file, .safetensors or torch's format.
        folder: to write; it must not exist, or be empty. It appears complete or not at all.
        vq: the image tokenizer's file; without it the model gives tokens but no pictures.
        kind: "class" or "text"; by default what the checkpoint holds.
        image_size: pixels per side; by default from the checkpoint's table of positions or its name (c2i_B_384.pt).
        heads: attention heads, for widths that were not published.
        dtype: of the transformer's weights; by default that of the checkpoint.
        progress: called with (layers done, layers in total).

    Raises:
        ValueError: in one line: for a file that is no such checkpoint, holds pickled code or a tensor without a place,
            sizes that do not fit together, or an image size that nobody knows.
        OSError: if a file cannot be read or written.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not an empty folder: give another one")
    theirs = read_checkpoint(checkpoint)
    sizes = TransformerSizes.of(theirs, kind, heads)
    decoder = None if vq is None else read_checkpoint(vq)
    settings = None if decoder is None else vq_config(decoder)
    grid, scale = _grid(theirs, sizes, image_size, settings)
    config = sizes.config(grid, None if settings is None else {**settings, "num_patches": grid})

    done = 0

    def layer_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, sizes.layers)

    weights = take_transformer(theirs, sizes, dtype, layer_done)
    theirs.finish()
    left_out = list(theirs.left_out)
    if decoder is not None:
        weights.update({f"vq_model.{name}": tensor for name, tensor in take_vq(decoder).items()})
        left_out += decoder.left_out
    model = _model(config, weights, theirs.path if decoder is None else f"{theirs.path} and {decoder.path}")
    _write(model, target, DRAWING[sizes.kind])
    return Conversion(
        folder=str(target),
        kind=sizes.kind,
        layers=sizes.layers,
        width=sizes.width,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        grid=grid,
        pixels=None if decoder is None else grid * scale,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        dtype=str(weights["lm_head.weight"].dtype).removeprefix("torch."),
        left_out=tuple(left_out),
    )


def _grid(
    checkpoint: Checkpoint, sizes: TransformerSizes, image_size: int | None, settings: dict[str, Any] | None
) -> tuple[int, int]:
    """Image tokens per side, and pixels per token."""
    scale = _DOWNSAMPLE if settings is None else 2 ** (len(settings["channel_multiplier"]) - 1)
    known = grid_in(checkpoint, sizes)
    if image_size is None and known is None:
        found = _SIZE_IN_NAME.search(os.path.basename(checkpoint.path))
        if not found:
            raise ValueError(f"{checkpoint.path} does not say how large its images are: give --image-size, such as 384")
        image_size = int(found[1])
    grid = known if image_size is None else image_size // scale
    if grid is None or grid < 1 or (image_size is not None and image_size % scale):
        raise ValueError(f"--image-size must be a multiple of {scale} pixels, got {image_size}")
    if known not in (None, grid):
        raise ValueError(
            f"--image-size {image_size} is {grid}x{grid} tokens, but {checkpoint.path} draws {known}x{known}"
        )
    return grid, scale


def _model(config: Any, weights: dict[str, torch.Tensor], source: str) -> Any:
    """The model with these weights, all of them and no others."""
    from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration

    with torch.device("meta"):
        model = LlamaGenForConditionalGeneration(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"{source}: no tensor for {name}: nothing was converted")
        if name not in wanted:
            raise ValueError(f"{source}: {name} has no place in the model: nothing was converted")
        if tuple(weights[name].shape) != wanted[name]:
            raise ValueError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, the other sizes ask for {wanted[name]}"
            )
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _write(model: Any, target: Path, drawing: dict[str, Any]) -> None:
    """Save beside the target, then move."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**drawing)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{os.getpid()}"
    try:
        staging.mkdir()
        model.save_pretrained(staging)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
