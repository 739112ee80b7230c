# SPDX-License-Identifier: Apache-2.0
"""Heads of a layer compete for one pool of entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..pieces import Allocation, Observed
from ..plan import Plan
from .shares import scaled
from .uniform import check_windows

_UNITS = 1000
"""The uniform share is rounded to a thousandth, so that everything is whole numbers and ties are true ties."""


@dataclass(frozen=True)
class Pooled:
    """The best scores of a layer, over all heads together, decide how many entries each head keeps (arXiv 2407.11550).

    Outside the sinks and the window, of b entries per head on the average, the G b best of the layer's scores are
    counted by head: f_g. A head keeps its window and `(1 - alpha) f_g + alpha b` entries, made whole by largest
    remainder, so that a layer holds exactly its budget.

    With `scope="model"` the heads of all L layers compete for one pool, and all layers together hold exactly the
    budget. Until the last layer has come, a text's heads hold what is among the L G b best of the layers that have
    come, so the outcome is that of all entries. Where entries leave by strata every layer keeps its G b `candidates`
    best instead (and every head at least b), which is exact as long as no layer wins more than `candidates` times the
    mean. An image's layers hold everything until then.

    While an image is written the budget is decided before all of its tokens are there; then the same share of what is
    there is counted as will be kept of the whole image.

    Attributes:
        alpha: share that is the same for every head; 1 is the uniform budget, 0 the pure competition.
        window: newest tokens of a text that are protected, at most half of the budget.
        window_rows: newest rows of an image that are protected.
        scope: "layer" or "model", who competes.
        candidates: budgets that a layer holds until the last one has come; for scope "model" and eviction by strata.
    """

    alpha: float = 0.2
    window: int = 32
    window_rows: float = 1.0
    scope: Literal["layer", "model"] = "layer"
    candidates: int = 4

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        check_windows(self.window, self.window_rows)
        if self.scope not in ("layer", "model"):
            raise ValueError(f"scope must be 'layer' or 'model', got {self.scope!r}")
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"candidates must be a whole number of budgets, at least 1, got {self.candidates!r}")

    @property
    def over_layers(self) -> bool:
        """True for scope "model"."""
        return self.scope == "model"

    def queries_needed(self, plan: Plan) -> int:
        """None are looked at."""
        return 0

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Count the best of every row and divide its budget."""
        budgets = observed.row_budgets
        windows = observed.plan.windows_of(budgets, tokens=self.window, rows=self.window_rows)
        window, free = observed.per_row(windows), observed.per_row(budgets) - observed.per_row(windows)  # [B, 1]
        candidates, values = candidates_of(observed, scores, window)  # [B, G, M]
        shares = self._shares(values, candidates, counted_of(observed, windows), free)
        return allocation_of(window + shares, window)

    def note(self, observed: Observed, scores: Tensor) -> Tensor:
        """Scores of what may be chosen, best first, [B, all heads, M] float32; -inf where there is no more."""
        windows = observed.plan.windows_of(observed.row_budgets, tokens=self.window, rows=self.window_rows)
        candidates, values = candidates_of(observed, scores, observed.per_row(windows))
        values = values.clamp(min=torch.finfo(values.dtype).min).masked_fill(~candidates, float("-inf"))
        return values.sort(dim=-1, descending=True).values

    def preselect(self, observed: Observed, scores: Tensor) -> Allocation:
        """The layer's best, a few budgets of them, and in every head its own best up to the mean."""
        windows = observed.plan.windows_of(observed.row_budgets, tokens=self.window, rows=self.window_rows)
        window, free = observed.per_row(windows), observed.per_row(observed.row_budgets) - observed.per_row(windows)
        candidates, values = candidates_of(observed, scores, window)
        found = best_of_row(values, candidates, free * (self.candidates * values.shape[1]))
        return allocation_of(window + found.maximum(free), window)

    def at_most(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """What is not among the best of the layers that have come is not among the best of all of them."""
        first = layers[0][0]
        noted = [observed.noted.to(first.seen.device) for observed, _ in layers if observed.noted is not None]
        windows = first.plan.windows_of(first.row_budgets, tokens=self.window, rows=self.window_rows)
        window, free = first.per_row(windows), first.per_row(first.row_budgets) - first.per_row(windows)
        heads = first.heads * max(first.plan.place.count, len(noted))
        best = counted_of(first, windows) * heads  # [B, 1], of all layers
        ranked = torch.cat([part.flatten(1) for part in noted], dim=1).sort(dim=-1, descending=True).values
        worst = ranked.gather(1, (best - 1).clamp(max=ranked.shape[1] - 1))[..., None]  # [B, 1, 1]
        found = torch.cat([((part >= worst) & (part > float("-inf"))).sum(-1) for part in noted], dim=1)
        weights, total = self._weights(found, best // heads), free.long() * heads
        # Of the heads to come nothing is found yet, and of all together at most the best.
        everything = self._weights(found.sum(-1, keepdim=True).minimum(best), best)
        shares = torch.where(everything > 0, weights * total // everything.clamp(min=1), free) + 1
        # What is found has to be there to be counted again, even if it is not all kept.
        targets = (window + shares.maximum(found)).minimum((first.seen - first.condition)[:, None].maximum(window))
        return [
            (part.to(observed.seen.device), window.to(observed.seen.device))
            for (observed, _), part in zip(layers, targets.split(first.heads, dim=1), strict=True)
        ]

    def divide(self, layers: Sequence[tuple[Observed, Tensor]]) -> list[Allocation]:
        """Count the best of every row over all layers and divide the model's budget."""
        first = layers[0][0]
        heads, device = first.heads, first.seen.device
        windows = first.plan.windows_of(first.row_budgets, tokens=self.window, rows=self.window_rows)
        window, free = first.per_row(windows), first.per_row(first.row_budgets) - first.per_row(windows)
        parts = [candidates_of(observed, scores, observed.per_row(windows)) for observed, scores in layers]
        longest = max(values.shape[-1] for _, values in parts)
        # Newest first, so what fills up comes before. Layers side by side: [B, L * G, M].
        candidates, values = (
            torch.cat([pad(part[index].to(device), (longest - part[index].shape[-1], 0)) for part in parts], dim=1)
            for index in (0, 1)
        )
        targets = window + self._shares(values, candidates, counted_of(first, windows), free)  # [B, L * G]
        totals = targets.unflatten(1, (-1, heads)).sum(-1)  # [B, L]
        before = (totals.cumsum(-1) - totals).T.tolist()
        return [
            allocation_of(part.to(observed.seen.device), observed.per_row(windows), before[index])
            for index, ((observed, _), part) in enumerate(zip(layers, targets.split(heads, dim=1), strict=True))
        ]

    def _shares(self, values: Tensor, candidates: Tensor, counted: Tensor, free: Tensor) -> Tensor:
        """What each of K heads may choose, [B, K]: rows sum to exactly K times `free` [B, 1].

        The K times `counted` [B, 1] best of a row's values [B, K, M] are counted.
        """
        heads = values.shape[1]
        found = best_of_row(values, candidates, counted * heads)
        weights = self._weights(found, counted)
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1)
        return scaled(weights, free.long() * heads)

    def _weights(self, found: Tensor, counted: Tensor) -> Tensor:
        """Whole numbers in proportion to what was found, and to what is the same for all."""
        uniform = round(self.alpha * _UNITS)
        return (_UNITS - uniform) * found + uniform * counted


def allocation_of(targets: Tensor, windows: Tensor, before: list[int] | None = None) -> Allocation:
    """Targets [B, G] and windows [B, 1] with what the host must know of them."""
    return Allocation(
        targets=targets.to(torch.int32),
        windows=windows.expand_as(targets).contiguous(),
        row_totals=targets.sum(-1).tolist(),
        largest=int(targets.max()),
        row_before=before,
    )


def counted_of(observed: Observed, windows: Sequence[int]) -> Tensor:
    """Entries per head that count when heads compete, [B, 1] int64.

    Outside the window (`windows`, by row) the share of what has been seen that will be kept of everything. A text has
    been seen whole, so there it is what a head keeps; an image is still being written.
    """
    budgets, plan = observed.row_budgets, observed.plan
    room = [
        max(plan.limit(seen) - window, budget - window, 1)
        for budget, window, seen in zip(budgets, windows, observed.row_seen, strict=True)
    ]
    limit, window = observed.per_row(room).long(), observed.per_row(windows)
    there = (observed.seen - observed.condition)[:, None].minimum(limit + window) - window
    free = observed.per_row(budgets) - window
    return ((there.clamp(min=0) * free + limit // 2) // limit).clamp(min=1)


def candidates_of(observed: Observed, scores: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries may be chosen, [B, G, M] bool newest first, and their scores; of all heads of the layer."""
    store = observed.store
    slots, filled = store.slots_in_order()
    slots, filled = slots.flip(-1), filled.flip(-1)
    position = store.positions[slots]
    first, last = observed.condition[:, None, None], (observed.seen[:, None] - window)[..., None]
    candidates = filled & (position >= first) & (position < last)
    return observed.shard.gather(candidates), observed.shard.gather(scores[slots].float())


def best_of_row(values: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """How many of the `count` best candidates of a row each head has; of equal scores the newer one is better.

    Args:
        values: [B, G, M] float, in the same order in every head, newest first.
        candidates: [B, G, M] bool.
        count: [B, 1] int.

    Returns:
        [B, G] int64; fewer in all than `count` where there are fewer candidates.
    """
    heads = values.shape[1]
    # Position by position, so that of equal scores the newer, and then the one of the first head, comes first.
    flat = values.masked_fill(~candidates, float("-inf")).transpose(1, 2).flatten(1)  # [B, M * G]
    order = flat.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(flat.shape[1], device=flat.device) < count  # [B, M * G]
    chosen &= candidates.transpose(1, 2).flatten(1).gather(1, order)
    found = torch.zeros(values.shape[0], heads, dtype=torch.int64, device=values.device)
    return found.scatter_add_(1, order % heads, chosen.long())
