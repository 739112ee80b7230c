# SPDX-License-Identifier: Apache-2.0
"""The generation loop of models that have none of their own, or none that serves: guidance in the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def draw_tokens(
    first: Tensor,
    mask: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    scores: Callable[[Tensor, Tensor, Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
    choose: Callable[[int, Tensor], Tensor],
    on_token: Callable[[], None] | None = None,
) -> Tensor:
    """Generate the tokens of one image per prompt.

    With guidance the first half of the rows are the prompts and the second half is what guidance leads away from; both
    read the same tokens. Positions are counted from the first real token of each row, so that a padded prompt gives
    the same image as alone.

    Args:
        first: [R, P, D], the embedded prompts, padded on the left.
        mask: int64 [R, P], 0 at padding.
        steps: tokens per image.
        guidance_scale: strength of guidance; 1 means that all rows are prompts.
        scores: called with embeddings [R, T, D], mask [R, columns so far] and position ids [R, T]; gives the scores
            [R, K] of what follows.
        embed: called with the tokens [R, 1]; gives their embeddings [R, 1, D].
        choose: called with the step and the guided scores float32 [B, K]; gives tokens int64 [B].
        on_token: called after every step.

    Returns:
        int64 [B, steps].
    """
    rows, columns = mask.shape
    guided = guidance_scale != 1
    # One column per token from the start, so that a step's mask is a view and never copied.
    full_mask = torch.cat((mask, mask.new_ones(rows, steps)), dim=1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # [R, P]
    inputs, drawn = first, []
    for step in range(steps):
        found = scores(inputs, full_mask[:, : columns + step], positions).float()  # [R, K]
        if guided:
            conditional, unconditional = found.chunk(2)
            found = unconditional + guidance_scale * (conditional - unconditional)  # [B, K]
        tokens = choose(step, found)
        drawn.append(tokens)
        if step + 1 < steps:  # nothing follows the last token, so it is never read
            inputs = embed((tokens.repeat(2) if guided else tokens).to(mask.device)[:, None])
            positions = positions[:, -1:] + 1
        if on_token is not None:
            on_token()
    return torch.stack(drawn, dim=1)


def pad_left(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask int64 [B, P] of prompts of different lengths."""
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def stack_rows(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of one batch after the other, the shorter one padded on the left."""
    longest = max(first[0].shape[1], second[0].shape[1])
    ids, mask = zip(first, second, strict=True)
    return _stacked(ids, longest, padding), _stacked(mask, longest, 0)


def _stacked(parts: tuple[Tensor, ...], columns: int, value: int) -> Tensor:
    return torch.cat([torch.nn.functional.pad(part, (columns - part.shape[1], 0), value=value) for part in parts])
