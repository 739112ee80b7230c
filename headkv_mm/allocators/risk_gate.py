# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head, of which a gate leaves empty what no good entry would fill."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..pieces import Allocation, Observed
from ..plan import Plan
from ..scorers.attention import check_window, sum_over_heads, window_attention
from .pooled import allocation_of, candidates_of
from .uniform import check_windows

GateTable = tuple[tuple[tuple[float, ...], ...], ...]
"""By compressed layer, bin of entropy and bin of perplexity; after the last bin what holds if it is not known."""


@dataclass(frozen=True)
class RiskGate:
    """Of the best entries within the budget those stay whose score reaches a threshold (arXiv 2602.08686, CompilerKV).

    The threshold is a cell of a table: of the layer, of the bin in which the entropy of the layer's attention falls
    (from the last `window` queries, averaged over them and the heads, divided by the largest possible), and of the bin
    of the prompt's perplexity. A cache does not see logits, so the perplexity is what the user states, or not known,
    for which the table has cells of its own. It is looked up once per row; later evictions keep the row's numbers.

    Sinks and window stay in any case. The layer holds fewer entries than its budget, never more.

    Attributes:
        window: queries, and newest tokens of a text that are protected, at most half of the budget.
        tables: file of compiled tables; None for those that ship for the model, "identity" for no threshold.
        perplexity: of the prompt's last tokens; None if it is not known.
        gate: thresholds of one's own in place of a table's, [L][E][P + 1].
        entropy_edges: [E - 1], the edges of its bins of entropy.
        perplexity_edges: [P - 1], the edges of its bins of perplexity.
    """

    window: int = 32
    tables: str | None = None
    perplexity: float | None = None
    gate: GateTable | None = None
    entropy_edges: tuple[float, ...] = ()
    perplexity_edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_windows(self.window, 0.0)
        check_window(self.window)
        if self.tables is not None and not isinstance(self.tables, str):
            raise ValueError(f"tables must be the name of a file, got {self.tables!r}")
        if self.perplexity is not None and not (_is_number(self.perplexity) and self.perplexity >= 1):
            raise ValueError(f"perplexity must be a number, at least 1, got {self.perplexity!r}")
        for name in ("entropy_edges", "perplexity_edges"):
            object.__setattr__(self, name, checked_edges(getattr(self, name), name))
        if self.gate is not None:
            bins = len(self.entropy_edges), len(self.perplexity_edges)
            object.__setattr__(self, "gate", checked_gate(self.gate, *bins))

    def for_model(self, model_or_config: Any) -> RiskGate:
        """The same with the thresholds of the tables, if it has none yet.

        Raises:
            ValueError: if there are no tables for this model, or they are of another one.
            FileNotFoundError: if there is no such file.
        """
        from ..compiled_tables import IDENTITY, compiled_tables_for

        if self.gate is not None or self.tables == IDENTITY:
            return self
        found = compiled_tables_for(model_or_config, self.tables)
        return replace(
            self, gate=found.gate, entropy_edges=found.entropy_edges, perplexity_edges=found.perplexity_edges
        )

    def queries_needed(self, plan: Plan) -> int:
        """The window's."""
        return self.window

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        """Count the entries of every row that reach the threshold.

        Raises:
            ValueError: without tables, or for those of a model with another number of layers.
        """
        windows = observed.plan.windows_of(observed.row_budgets, tokens=self.window, rows=0.0)
        window, budget = observed.per_row(windows), observed.per_row(observed.row_budgets)  # [B, 1]
        candidates, values = candidates_of(observed, scores, window)  # [B, G, M]
        passing = (candidates & (values >= self._thresholds(observed)[:, None, None])).sum(-1)  # [B, G]
        # With scores that differ by head all keep as many as the one that has most to keep.
        kept = window + passing.amax(-1, keepdim=True).minimum(budget - window)  # [B, 1]
        return replace(allocation_of(kept.expand(-1, observed.heads).contiguous(), window), alike=True)

    def _thresholds(self, observed: Observed) -> Tensor:
        """The threshold of every row, [B] float32."""
        from ..compiled_tables import IDENTITY

        place, device = observed.plan.place, observed.seen.device
        if self.gate is None:
            if self.tables != IDENTITY:
                raise ValueError("this allocator has no thresholds; a HeadKVCache takes them from the model's tables")
            return torch.zeros(observed.store.rows, device=device)
        if len(self.gate) != place.count:
            raise ValueError(
                f"the thresholds are of {len(self.gate)} layers, and the model has {place.count} to compress"
            )
        column = -1 if self.perplexity is None else bisect_right(self.perplexity_edges, self.perplexity)
        cells = torch.tensor([row[column] for row in self.gate[place.index]], device=device)  # [E]
        edges = torch.tensor(self.entropy_edges, device=device)
        return cells[torch.bucketize(attention_entropy(observed, self.window), edges, right=True)]


def attention_entropy(observed: Observed, window: int) -> Tensor:
    """How evenly a layer attends to what it holds: 0 for one entry, 1 for all of them alike; [B] float32.

    It is the entropy of the attention of the last `window` queries, averaged over them and over the layer's heads,
    divided by the logarithm of the number of entries.
    """
    attention = window_attention(observed, *observed.last_queries(window))
    mass = sum_over_heads(attention, observed)  # [B, longest row]
    held = (sum_over_heads(torch.ones_like(attention), observed) > 0).sum(-1)  # [B]
    share = mass / mass.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1) / held.clamp(min=2).float().log()
    return entropy


def checked_gate(gate: Sequence[Sequence[Sequence[float]]], entropy_edges: int, perplexity_edges: int) -> GateTable:
    """Thresholds by layer and bins, given the numbers of edges.

    Raises:
        ValueError: if they have another shape, or are not numbers of 0 or more.
    """
    shape = f"[layers][{entropy_edges + 1}][{perplexity_edges + 2}]"
    try:
        table = tuple(tuple(tuple(row) for row in layer) for layer in gate)
    except TypeError:
        raise ValueError(f"the gate must be lists of numbers, {shape}") from None
    if not table or any(
        len(layer) != entropy_edges + 1 or any(len(row) != perplexity_edges + 2 for row in layer) for layer in table
    ):
        raise ValueError(f"the gate must have the shape {shape} with these edges")
    cells = [cell for layer in table for row in layer for cell in row]
    if not all(_is_number(cell) and cell >= 0 for cell in cells):
        raise ValueError("the gate's thresholds must be finite numbers that are not negative")
    return tuple(tuple(tuple(float(cell) for cell in row) for row in layer) for layer in table)


def checked_edges(edges: Sequence[float], name: str) -> tuple[float, ...]:
    """The edges of bins.

    Raises:
        ValueError: if they are not ascending numbers.
    """
    if not isinstance(edges, Sequence) or not all(map(_is_number, edges)):
        raise ValueError(f"{name} must be a list of numbers")
    if any(left > right for left, right in pairwise(edges)):
        raise ValueError(f"{name} must ascend")
    return tuple(float(edge) for edge in edges)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
