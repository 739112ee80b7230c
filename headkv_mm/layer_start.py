# SPDX-License-Identifier: Apache-2.0
"""Start: the compressor that takes a layer's prompt over."""

from __future__ import annotations

from torch import Tensor

from .budgets import ImagePlan
from .compressor import LayerCompressor
from .image_compressor import ImageCompressor
from .model_pool import ModelPool
from .passed import Passed
from .plan import Plan
from .prompt import LeftPadded, Prompt
from .propagation import Propagation
from .registry import Pieces
from .text_compressor import TextCompressor
from .text_plan import TextPlan


def compressor_of(
    pieces: Pieces,
    plan: Plan,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    row_prompt: list[int],
    prompt: Prompt,
    *,
    pool: ModelPool,
    passed: Passed | None = None,
    chooser: Propagation | None = None,
) -> tuple[LayerCompressor, int]:
    """Select among a prompt.

    Args:
        pieces: the method's.
        plan: of the layer.
        keys, values: [B, G, T, D].
        visible: [B, T] bool, False for padding.
        row_prompt: real prompt tokens of each row, on the host.
        prompt: its queries.
        pool: where the layers of the cache meet.
        passed: where the tokens belong if others of the prompt went no further; None if all came.
        chooser: what must know which tokens this layer finds important; None for most layers.

    Returns:
        The compressor, and bytes of the dense keys and values that were held beside it.

    Raises:
        TypeError: for a plan that is neither an image's nor a text's.
    """
    if isinstance(plan, ImagePlan):
        return ImageCompressor(pieces, plan, keys, values, visible, row_prompt, pool), 0
    if not isinstance(plan, TextPlan):
        raise TypeError(f"a layer follows an ImagePlan or a TextPlan, got {type(plan).__name__}")
    left = LeftPadded.of(keys, values, visible, prompt, None if passed is None else passed.positions)
    compressor = TextCompressor(
        pieces,
        plan,
        left.keys,
        left.values,
        left.padding,
        row_prompt,
        left.prompt.asked(keys.shape[2], left.padding),
        pool,
        positions=left.positions,
        propagation=chooser,
    )
    return compressor, left.keys.nbytes + left.values.nbytes
