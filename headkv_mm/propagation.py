# SPDX-License-Identifier: Apache-2.0
"""Token-selective propagation (arXiv 2502.01068): after one layer of the model only chosen tokens of a forward go on.

The state lies in the cache. The hooks that let the decoder layers follow it are in `headkv_mm.layer_hooks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .passed import Passed
from .pieces import Observed, Scorer
from .prompt import Reading
from .ragged import RaggedKV
from .schedules import TokenSelective
from .scorers.attention import sum_over_heads
from .text_plan import TextPlan

if TYPE_CHECKING:
    from .layer_hooks import LayerHooks


@dataclass(frozen=True)
class Selection:
    """The tokens of one forward that go on.

    Attributes:
        columns: [B, S] int64, their columns in the forward, ascending; padding at the left is -1.
        passed: the same as positions.
        counts: how many of each row, on the host.
        tokens: T, columns of the forward.
        real: [B, T] bool, which of these are no padding; None if all are.
    """

    columns: Tensor
    passed: Passed
    counts: list[int]
    tokens: int
    real: Tensor | None

    @property
    def width(self) -> int:
        """S."""
        return self.columns.shape[1]

    @property
    def padded(self) -> bool:
        """Is any of the columns that go on padding?"""
        return min(self.counts) < self.width

    def take(self, whole: Tensor) -> Tensor:
        """What goes on, [B, S, D] of [B, T, D]; a single row stands for all."""
        columns = self.columns.clamp(min=0).to(whole.device)[..., None]  # [B, S, 1]
        return whole.expand(len(columns), -1, -1).take_along_dim(columns, 1)

    def put_back(self, chosen: Tensor) -> Tensor:
        """[B, T, D] of [B, S, D]; NaN where a token did not go on, so that nothing can be read there by mistake."""
        columns = self.columns.to(chosen.device)
        whole = chosen.new_full((chosen.shape[0], self.tokens + 1, chosen.shape[2]), float("nan"))
        places = torch.where(columns < 0, self.tokens, columns)  # padding goes where nobody looks
        whole.scatter_(1, places[..., None].expand_as(chosen), chosen)
        return whole[:, : self.tokens]


class Propagation:
    """Where the layers of one cache meet while a forward goes through them.

    Args:
        schedule: the method's, with its layer known.
        hooks: held so that they stay on the model's layers as long as the cache lives; None without any.
    """

    def __init__(self, schedule: TokenSelective, hooks: LayerHooks | None) -> None:
        self.schedule, self.hooks = schedule, hooks
        self.layer = schedule.chosen_layer
        self.selection: Selection | None = None
        """Of the forward that is under way; None while everything goes on."""
        self.mask: Tensor | None = None
        """The mask of the layers after, made once per forward."""
        self.entered = False
        """The hooks have seen this forward."""
        self._saliency: Tensor | None = None

    def begin(self) -> None:
        """A forward is about to enter the layer that chooses."""
        self.finish()
        self.entered = True

    def finish(self) -> None:
        """Forget the forward."""
        self.selection = self.mask = self._saliency = None
        self.entered = False

    def incoming(self, layer: int) -> Selection | None:
        """What reaches a layer; None for everything."""
        return self.selection if layer > self.layer else None

    def look(self, scorer: Scorer, observed: Observed) -> None:
        """The layer that chooses has its entries and queries: rank the tokens by the sum of their heads' scores."""
        self._saliency = sum_over_heads(scorer.score_entries(observed), observed)  # [B, P]

    def counts(self, plan: TextPlan, row_before: Sequence[int], row_tokens: Sequence[int]) -> list[int]:
        """How many tokens of each row go on."""
        rows = zip(row_before, row_tokens, strict=True)
        return [self.schedule.passing(plan, before, tokens) for before, tokens in rows]

    def choose(
        self,
        plan: TextPlan,
        row_before: Sequence[int],
        row_tokens: Sequence[int],
        tokens: int,
        real: Tensor | None,
        *,
        always: bool = False,
    ) -> None:
        """Choose among the tokens of the forward.

        Args:
            plan: of the layer.
            row_before: real tokens of each row before the forward.
            row_tokens: real tokens of each row in it.
            tokens: T, its columns.
            real: [B, T] bool, which of these are no padding; None if all are.
            always: later layers must be told also where everything goes on, because they put chunks together.

        Raises:
            RuntimeError: if the forward did not come through hooked layers, so that nothing would follow the choice.
        """
        saliency, self._saliency = self._saliency, None
        entered, self.entered = self.entered, False
        counts = self.counts(plan, row_before, row_tokens)
        if saliency is None or (counts == list(row_tokens) and not always):
            return
        if not entered:
            raise RuntimeError(
                "this method lets only some tokens go on to later layers, and the model's layers are not hooked up to "
                "this cache (any more): make HeadKVCache(model, ...) from the model that runs, or generate inside "
                "`with headkv_mm.compress(model, ...)`"
            )
        rows = [
            (before, count, plan.held_sinks(plan.entries(before + new)))
            for before, count, new in zip(row_before, counts, row_tokens, strict=True)
        ]
        first, count, sinks = torch.tensor(rows, device=saliency.device).T[..., None]  # [B, 1] each
        place = torch.arange(tokens, device=saliency.device).expand(len(rows), -1)  # [B, T]
        if real is not None:
            place = torch.where(real, real.cumsum(-1) - 1, -1)
        positions = torch.where(place < 0, -1, first + place)  # [B, T]
        scores = saliency.gather(1, positions.clamp(min=0))
        new = torch.tensor(row_tokens, device=saliency.device)[:, None]
        protected = (positions < sinks) | (place >= new - self.schedule.window)
        scores = scores.masked_fill(protected, float("inf")).masked_fill(place < 0, float("-inf"))
        columns = best_columns(scores, count, max(counts))
        chosen = torch.where(columns < 0, -1, positions.gather(1, columns.clamp(min=0)))
        seen = [before + new for before, new in zip(row_before, row_tokens, strict=True)]
        self.selection = Selection(columns, Passed(chosen.to(torch.int32), seen), counts, tokens, real)

    def choose_reading(
        self, scorer: Scorer, observed: Observed, plan: TextPlan, tokens: int, real: Tensor | None
    ) -> None:
        """Look, and choose among the last `tokens` of a prompt that is being read; see `look` and `choose`."""
        self.look(scorer, observed)
        new = [tokens] * len(observed.row_seen) if real is None else real.sum(-1).tolist()
        before = [seen - count for seen, count in zip(observed.row_seen, new, strict=True)]
        self.choose(plan, before, new, tokens, real, always=True)


def best_columns(scores: Tensor, count: Tensor, width: int) -> Tensor:
    """The columns of the best scores in ascending order; of equal scores the newer column is better.

    Args:
        scores: [B, T].
        count: [B, 1] int, how many of each row, at most `width`.
        width: S.

    Returns:
        [B, S] int64, -1 at the left of rows with fewer than S.
    """
    tokens = scores.shape[1]
    order = tokens - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :width]  # [B, S]
    chosen = torch.arange(width, device=scores.device) < count
    return torch.where(chosen, order, -1).sort(-1).values


def observe_reading(reading: Reading, plan: TextPlan, keys: Tensor, values: Tensor) -> Observed:
    """A prompt that is being read, as a scorer looks at it: all entries so far, and the last queries.

    Args:
        reading: with its last chunk.
        plan: of the layer.
        keys, values: [B, G, P, D] so far.
    """
    rows, _, columns, _ = keys.shape
    visible, prompt = reading.visible, reading.prompt
    if prompt is None:
        raise RuntimeError("nothing was read yet")
    if visible is None:
        visible, row_seen = keys.new_ones(rows, columns, dtype=torch.bool), [columns] * rows
    else:
        row_seen = visible.sum(-1).tolist()
        order = visible.int().argsort(dim=-1, stable=True)  # [B, P], padding at the left
        keys, values = (part.take_along_dim(order[:, None, :, None], 2) for part in (keys, values))
    positions = torch.where(visible, visible.cumsum(-1) - 1, -1).to(torch.int32)  # [B, P]
    asked = replace(prompt, positions=positions[:, -prompt.query.shape[2] :]).asked(columns, positions)
    entries = [plan.entries(seen) for seen in row_seen]
    first = [plan.held_sinks(count) for count in entries]
    return Observed(
        store=RaggedKV.over(keys, values, (~visible).sum(-1, dtype=torch.int32)),
        plan=plan,
        condition=torch.tensor(first, dtype=torch.int32, device=keys.device),
        seen=visible.sum(-1, dtype=torch.int32),
        scale=asked.scale,
        row_budgets=[count - sinks for count, sinks in zip(entries, first, strict=True)],
        row_seen=row_seen,
        mean_query=asked.mean,
        queries=asked.queries,
        query_positions=asked.positions,
        softcap=asked.softcap,
        sinks=asked.sinks,
    )
