# SPDX-License-Identifier: Apache-2.0
"""The oracle: the attention that a head's best entries get in the rest of the generation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headkv_mm.evaluation.heads.attending import RecordedRow


@dataclass(frozen=True)
class Future:
    """What every further entry retains of a head's attention in the rest of the generation.

    One less the sum over all N is what stays anyway: the condition, and entries that are written after a choice.

    Attributes:
        best: [G, N] float32, if the head keeps the entries that get most: falling.
        ranked: by name of a ranking [G, N] float32, if it keeps those that come first in it.
    """

    best: Tensor
    ranked: dict[str, Tensor]


def future_gains(
    layer: RecordedRow, stretches: Sequence[tuple[int, int]], scores: Iterable[dict[str, Tensor]]
) -> Future:
    """Look ahead.

    A method chooses before each stretch, among the entries that are there, and what leaves is gone for the rest of the
    generation. So the best k entries before a stretch are those that this stretch and all later ones look at most. In
    an image a stretch is a row; a text's question and answers are one stretch. The choices are made for each stretch
    anew, without regard to earlier ones: the best are a bound and no method.

    Args:
        layer: what was recorded.
        stretches: first query and last + 1, one stretch after the other up to the end.
        scores: for each stretch by name of a ranking [G, n], of the entries there; the highest stay.

    Returns:
        Shares of all attention in the rest of the generation, mean over the choices; N is the most entries among which
        one chooses.
    """
    first, most, end = layer.first, stretches[-1][0] - layer.first, stretches[-1][1]
    empty = layer.keys.new_zeros(layer.keys.shape[0], most)
    best = empty.clone()
    ranked: dict[str, Tensor] = {}
    later = layer.keys.new_zeros(layer.keys.shape[0], end)  # attention of the queries of this stretch and after it
    for (begin, stop), rankings in reversed(list(zip(stretches, scores, strict=True))):
        later[:, :stop] += layer.mass(begin, stop) * (stop - begin)
        held, coming = begin - first, later[:, first:begin] / ((end - begin) * len(stretches))
        best[:, :held] += coming.sort(dim=-1, descending=True).values
        for name, score in rankings.items():
            order = score.argsort(dim=-1, descending=True, stable=True)
            ranked.setdefault(name, empty.clone())[:, :held] += coming.gather(-1, order)
    return Future(best, ranked)


def image_stretches(first: int, row: int, rows: int, decided: int) -> list[tuple[int, int]]:
    """The rows of an image after the decision.

    Args:
        first: entries of the condition.
        row: tokens of a row.
        rows: rows of the image.
        decided: rows before the decision.
    """
    starts = [first + number * row for number in range(decided, rows)]
    return [(start, start + row) for start in starts]


def entries_needed(gains: Tensor, share: float) -> Tensor:
    """Entries without which a head would lose more than `1 - share` of all its attention.

    Args:
        gains: [..., N], falling; see `Future`.
        share: in (0, 1).

    Returns:
        [...] int64, 0 for a head whose attention goes to what stays anyway.
    """
    lost = gains.double().flip(-1).cumsum(-1).flip(-1)  # [..., N]: what is lost if the entries from k on leave
    return (lost > 1 - share).sum(-1)


def resampled(gains: Tensor, entries: int) -> Tensor:
    """The same curve over another number of entries: shares of the entries retain the same shares of the attention.

    Args:
        gains: [..., N], falling.
        entries: M.

    Returns:
        [..., M] float64, falling; sums stay the same.
    """
    known = gains.shape[-1]
    if known == entries:
        return gains.double()
    curve = torch.nn.functional.pad(gains.double().cumsum(-1), (1, 0))  # [..., N + 1]
    place = torch.arange(entries + 1, device=gains.device, dtype=torch.float64) * (known / entries)
    below = place.floor().long().clamp(max=known - 1)
    part = place - below
    at = curve[..., below] * (1 - part) + curve[..., below + 1] * part
    # A concave curve has falling gains; rounding may not.
    return at.diff(dim=-1).clamp(min=0).cummin(-1).values
