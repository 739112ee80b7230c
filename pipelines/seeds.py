# SPDX-License-Identifier: Apache-2.0
"""Which seed belongs to which image.

Image j of a prompt has the seed `seed + j`, whatever else is in the batch. So an image can be made again on its own:
image 3 of `seed=10` is the only image of `seed=13`.
"""

from __future__ import annotations

from collections.abc import Sequence

_LIMIT = 2**63


def check_seed(seed: object) -> int | tuple[int, ...] | None:
    """Check what a user gave as `seed`.

    Args:
        seed: an integer, a list with one integer per image (of a prompt, or of all prompts), or None.

    Returns:
        The integer, the list as a tuple, or None.

    Raises:
        TypeError: for anything else.
        ValueError: for an integer outside 0 to 2**63 - 1, or an empty list.
    """
    if seed is None:
        return None
    if isinstance(seed, int):
        return _check_integer(seed)
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if not seed:
            raise ValueError("seed is an empty list: give one integer per image, or one integer")
        return tuple(_check_integer(item) for item in seed)
    raise TypeError(f"seed must be an integer or a list of integers, got {type(seed).__name__}")


def image_seeds(
    seed: int | tuple[int, ...] | None, num_images: int, *, index: int = 0, prompts: int | None = 1
) -> list[int]:
    """The seeds of the images of one prompt.

    Args:
        seed: the first image's seed, one seed per image of a prompt, one seed per image of all prompts, prompt by
            prompt, or None for a seed from torch's global generator.
        num_images: number of images of the prompt.
        index: number of the prompt.
        prompts: how many prompts there are; None if nobody knows.

    Returns:
        One integer per image.

    Raises:
        ValueError: if a list of seeds has another length.
    """
    if isinstance(seed, tuple):
        if len(seed) == num_images:
            return list(seed)
        if prompts is not None and len(seed) == num_images * prompts:
            return list(seed[index * num_images : (index + 1) * num_images])
        images = f"{num_images} image{'s' if num_images > 1 else ''} per prompt"
        raise ValueError(
            f"got {len(seed)} seeds for {images}{f' and {prompts} prompts' if prompts not in (1, None) else ''}: "
            "give one seed per image (num_images), or one integer"
        )
    if seed is None:
        import torch

        seed = int(torch.randint(2**31, ()))
    return [(seed + number) % _LIMIT for number in range(num_images)]


def _check_integer(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or a list of integers, got {seed!r}")
    if not 0 <= seed < _LIMIT:
        raise ValueError(f"seed must be in 0..2**63 - 1, got {seed}")
    return seed
