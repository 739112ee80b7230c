# SPDX-License-Identifier: Apache-2.0
"""How many images are drawn together when the user does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from headkv_mm.batch.prompts import Prompt
    from headkv_mm.pipelines.text_to_image import TextToImagePipeline

WITHOUT_MEMORY = 8
"""Images together where the memory is not an accelerator's own."""
_MOST = 256
_SHARE = 0.85  # of the memory; the rest is for pictures, kernels' buffers and fragments


def device_memory(device: torch.device) -> int | None:
    """Bytes this process may use of an accelerator, those it has already included; None on the CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + int(torch.cuda.memory_reserved(device))


def batch_that_fits(pipe: TextToImagePipeline, prompts: Sequence[Prompt], memory: int | None) -> int:
    """Images that fit the memory beside the weights.

    Args:
        pipe: the pipeline with all its settings.
        prompts: the list; the longest text counts.
        memory: bytes, or None if there is no telling.

    Raises:
        ValueError: if not even one image fits.
    """
    if memory is None:
        return WITHOUT_MEMORY
    from headkv_mm.fits import largest_batch

    settings = pipe.settings()
    count = largest_batch(
        pipe.model,
        settings["kv_compression"],
        memory=int(_SHARE * memory),
        guided=settings["sampling"]["guidance_scale"] != 1,
        condition=_longest(pipe, prompts),
        image_grid=pipe.image_grid,
    )
    if count < 1:
        raise ValueError(
            "one image does not fit this device: use a smaller --kv-budget or --device-map auto, or say --batch-size 1"
        )
    return min(count, _MOST)


def _longest(pipe: TextToImagePipeline, prompts: Sequence[Prompt]) -> int:
    """Positions before the image, for the longest text that the model can read; 1 for a class."""
    for text in sorted((prompt.prompt for prompt in prompts if prompt.prompt), key=len, reverse=True):
        try:
            encoded = pipe.preprocess(pipe.check_prompts([text]))["prompts"]
        except ValueError:
            continue
        columns = [value.shape[-1] for name, value in encoded.inputs.items() if name == "attention_mask"]
        return int(max([*columns, int(encoded.condition_lengths.max())]))
    return 1
