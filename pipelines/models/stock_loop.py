# SPDX-License-Identifier: Apache-2.0
"""Image tokens from a model's stock `generate`: logits processors that guide, draw and count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv_mm.image_sampling import TokenDrawer


class DrawTokens(LogitsProcessor):
    """Draws every token itself and leaves `generate` no choice but to take it.

    `generate` draws a whole batch from one random stream; here every image has its own, so that it does not depend on
    the batch.

    Args:
        columns: columns of the prompt.
        allowed: for every step the ids that may be drawn, int64 [K], ascending, on the model's device. A single id is
            taken without drawing.
        drawer: draws.
        on_token: called after every step.
    """

    def __init__(
        self,
        columns: int,
        allowed: Callable[[int], torch.Tensor],
        drawer: TokenDrawer,
        on_token: Callable[[], None] | None = None,
    ) -> None:
        self._columns, self._allowed, self._drawer, self._on_token = columns, allowed, drawer, on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that are -inf but at the token drawn."""
        step = input_ids.shape[1] - self._columns
        ids = self._allowed(step)
        if len(ids) == 1:
            tokens = ids.expand(len(scores))
        else:
            tokens = ids[self._drawer(step, scores[:, ids])]
        if self._on_token is not None:
            self._on_token()
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class GuidanceOnCache(UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """Stock guidance whose second branch runs on a cache that is given.

    Args:
        scale: guidance scale.
        model: the model that generates.
        ids, mask: int64 [B, P], the negative prompts.
        cache: an empty cache; None for what the model makes itself.
    """

    def __init__(
        self, scale: float, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None
    ) -> None:
        super().__init__(scale, model, unconditional_ids=ids, unconditional_attention_mask=mask)
        self.unconditional_context["past_key_values"] = cache

    @property
    def cache(self) -> Any:
        """The cache of the second branch."""
        return self.unconditional_context["past_key_values"]


def generate_tokens(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    *,
    steps: int,
    processors: Sequence[LogitsProcessor],
    cache: Any = None,
) -> tuple[torch.Tensor, Any]:
    """Run the model's own `generate`.

    Args:
        model: any model that generates.
        inputs: keyword arguments for `generate`, `input_ids` [B, P] among them.
        steps: tokens to generate.
        processors: the last one draws (`DrawTokens`).
        cache: an empty cache, or None for what `generate` makes.

    Returns:
        int64 [B, steps], and the cache that was used.
    """
    made = model.generate(
        **inputs,
        **({} if cache is None else {"past_key_values": cache}),
        max_new_tokens=steps,
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        # The processors guide and draw; what the model's generation config says of it would come on top.
        guidance_scale=1.0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )
    return made.sequences[:, inputs["input_ids"].shape[1] :], made.past_key_values
