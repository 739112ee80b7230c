# SPDX-License-Identifier: Apache-2.0
"""A prompt's attention scores, computed once for all budgets (and for all methods that share a scorer)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from headkv_mm.kernels.mass_kinds import MassOf
from headkv_mm.layer import HeadKVLayer
from headkv_mm.pieces import Observed, Scorer
from headkv_mm.plan import Plan
from headkv_mm.scorers import AccumulatedAttention, ExpectedAttention, Redundancy, WindowAttention

Scores = dict[tuple[int, Scorer], Tensor]
"""[N] float32 by layer and scorer, for one prompt."""

_ALIKE_FOR_EVERY_BUDGET = (AccumulatedAttention, ExpectedAttention, Redundancy, WindowAttention)
"""They look at the prompt's queries, keys and values and at nothing else. They are the scorers that take long."""


@dataclass(frozen=True)
class Remembered(Scorer):
    """A scorer that computes the scores of one prompt once.

    Attributes:
        scorer: what it stands for.
        layer: index of the layer.
        scores: of the prompt; shared by all caches that hold this prompt.
    """

    scorer: Scorer
    layer: int
    scores: Scores = field(compare=False, repr=False)

    @property
    def needs_mean_query(self) -> bool:
        return self.scorer.needs_mean_query

    @property
    def accumulates(self) -> bool:
        return self.scorer.accumulates

    @property
    def adds_up(self) -> MassOf:
        return self.scorer.adds_up

    def queries_needed(self, plan: Plan, *, decoding: bool) -> int:
        return self.scorer.queries_needed(plan, decoding=decoding)

    def attention_window(self, plan: Plan) -> int:
        return self.scorer.attention_window(plan)

    def mean_window(self, plan: Plan) -> int:
        return self.scorer.mean_window(plan)

    def held(self, plan: Plan) -> list[Tensor]:
        return self.scorer.held(plan)

    def held_bytes(self, heads: int, head_dim: int) -> int:
        return self.scorer.held_bytes(heads, head_dim)

    def score_entries(self, observed: Observed) -> Tensor:
        key = (self.layer, self.scorer)
        if key not in self.scores:
            self.scores[key] = self.scorer.score_entries(observed)
        return self.scores[key].clone()  # a scorer that accumulates goes on adding to them


@contextmanager
def remembering(layer: HeadKVLayer, scores: Scores) -> Iterator[None]:
    """While the layer takes a prompt, its scorer remembers, if its scores are the same for every budget."""
    pieces = layer.pieces
    if pieces is None or not isinstance(pieces.scorer, _ALIKE_FOR_EVERY_BUDGET):
        yield
        return
    layer.pieces = replace(pieces, scorer=Remembered(pieces.scorer, layer.place.index, scores))
    yield
    layer.pieces = pieces
    if layer.compressor is not None:
        layer.compressor.pieces = pieces
