# SPDX-License-Identifier: Apache-2.0
"""Everything that may say how many entries a head will need: statistics, curves, tables, and bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headkv_mm.evaluation.heads.allocations import in_scope, proportional, water_filled
from headkv_mm.evaluation.heads.measured import Measured
from headkv_mm.evaluation.heads.needs import entries_needed, resampled
from headkv_mm.evaluation.heads.statistics import POINTED

ORACLE = "oracle curves"
UNIFORM = "uniform"
CONTRASTS = (4, 8)
"""Powers to which pointed attention is raised."""
SHUFFLED = "oracle budgets, shuffled among the heads"


@dataclass(frozen=True)
class Prediction:
    """What one predictor says of the heads of one item.

    Attributes:
        need: [L, G] float64, ranks the heads, and is what budgets are proportional to where there is no curve.
        gains: [L, G, N] float64, falling, if it predicts a curve; then budgets are water-filled on it.
    """

    need: Tensor
    gains: Tensor | None = None

    def targets(self, scope: str, *, mean: int, floor: int, limit: int) -> Tensor:
        """Entries of every head, [pools, heads]."""
        if self.gains is None:
            return proportional(in_scope(self.need, scope), mean=mean, floor=floor, limit=limit)
        return water_filled(in_scope(self.gains, scope), mean=mean, floor=floor)


@dataclass(frozen=True)
class Predictor:
    """A predictor over all items.

    Attributes:
        name: what it is.
        kind: "online", known from the item itself when the method decides; "others", measured on other items; or
            "bound".
        form: how budgets follow from it.
        predictions: one per item.
    """

    name: str
    kind: str
    form: str
    predictions: list[Prediction]


def predictors(items: Sequence[Measured], share: float, tables: Mapping[str, Tensor]) -> list[Predictor]:
    """All predictors of some items.

    Args:
        items: at least two.
        share: of `needs.entries_needed`.
        tables: by name [L, G], numbers that were measured on other material.
    """
    return [
        *(
            Predictor(name, "online", "proportional", [Prediction(item.statistics[name].double()) for item in items])
            for name in items[0].statistics
        ),
        *_contrasted(items),
        _curves("attention of the last row, pooled", "online", [item.window for item in items], items, share),
        _curves("the same times projected value, pooled", "online", _of_one(items), items, share),
        *_of_others(items, share),
        *(
            Predictor(name, "others", "proportional", [Prediction(table.double())] * len(items))
            for name, table in tables.items()
        ),
        *_bounds(items, share),
    ]


def _curves(
    name: str, kind: str, gains: Sequence[Tensor], items: Sequence[Measured], share: float, form: str = "water-filled"
) -> Predictor:
    """Curves over as many entries as can leave, whatever number they were seen over."""
    fitted = [resampled(one, item.future.shape[-1]) for one, item in zip(gains, items, strict=True)]
    predictions = [Prediction(entries_needed(one, share).double(), one) for one in fitted]
    if form != "water-filled":
        predictions = [Prediction(one.need) for one in predictions]
    return Predictor(name, kind, form, predictions)


def _contrasted(items: Sequence[Measured]) -> list[Predictor]:
    """Powers of pointed attention: the same order of the heads, and more for those that are ahead."""
    found = [item.statistics[POINTED].double() for item in items]
    # In shares of the largest, so that a power of something small is not lost.
    shares = [one / one.amax().clamp(min=torch.finfo(torch.float64).tiny) for one in found]
    return [
        Predictor(
            f"{POINTED}, contrast {power}", "online", f"power {power}", [Prediction(one**power) for one in shares]
        )
        for power in CONTRASTS
    ]


def _of_one(items: Sequence[Measured]) -> list[Tensor]:
    """Value-weighted attention in units of its mean over the heads, so that needs can be counted in shares."""
    return [item.valued / item.valued.sum(-1).mean().clamp(min=torch.finfo(torch.float32).tiny) for item in items]


def _of_others(items: Sequence[Measured], share: float) -> list[Predictor]:
    """The mean oracle of all other items, and that of the item before (of the first: the last)."""
    before = [items[index - 1].future for index in range(len(items))]
    table = []
    for index, item in enumerate(items):
        most = item.future.shape[-1]
        others = [resampled(other.future, most) for place, other in enumerate(items) if place != index]
        table.append(torch.stack(others).mean(0).cummin(-1).values)
    return [
        _curves("calibrated table of curves", "others", table, items, share),
        _curves("calibrated table of needs", "others", table, items, share, "proportional"),
        _curves("the item before, curves", "others", before, items, share),
        _curves("the item before, needs", "others", before, items, share, "proportional"),
    ]


def _bounds(items: Sequence[Measured], share: float) -> list[Predictor]:
    future = [item.future for item in items]
    equal = [Prediction(torch.ones(one.shape[:2], dtype=torch.float64)) for one in future]
    oracle = _curves(ORACLE, "bound", future, items, share)
    return [
        oracle,
        _curves("oracle needs", "bound", future, items, share, "proportional"),
        Predictor(SHUFFLED, "bound", "water-filled", oracle.predictions),
        Predictor(UNIFORM, "bound", "equal", equal),
    ]
