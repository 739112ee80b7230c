# SPDX-License-Identifier: Apache-2.0
"""What `results.json` of a measurement holds: needs by head, and how well every predictor foretells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headkv_mm.evaluation.bootstrap import Values, estimate, resampling_counts
from headkv_mm.evaluation.heads.allocations import (
    SCOPES,
    in_scope,
    mean_entries,
    retained,
    retained_if_shuffled,
    water_filled,
)
from headkv_mm.evaluation.heads.measured import Measured
from headkv_mm.evaluation.heads.needs import entries_needed
from headkv_mm.evaluation.heads.predictors import SHUFFLED, Predictor, predictors
from headkv_mm.evaluation.heads.rankings import LAST_ROW
from headkv_mm.evaluation.heads.ranks import spearman, spearman_within
from headkv_mm.evaluation.heads.settings import HeadSettings
from headkv_mm.evaluation.heads.statistics import early_need
from headkv_mm.evaluation.settings import budget_label

Measures = dict[str, list[float]]
"""By name, one number per item."""


def results(
    settings: HeadSettings,
    items: Sequence[Measured],
    shared: Mapping[str, Any],
    origin: Mapping[str, Any],
    tables: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Sum up.

    Args:
        settings: what was measured.
        items: as many as the settings say.
        shared: settings of the files.
        origin: versions and commit.
        tables: by name [L, G], see `predictors.predictors`.
    """
    counts = resampling_counts(len(items), settings.resamples, settings.seed)
    needs = [entries_needed(item.future, settings.share).double() for item in items]
    found = predictors(items, settings.share, tables)
    outcomes = {
        label: _outcomes(found, items, settings, budget, counts) for label, budget in _labelled(settings).items()
    }
    return {
        "settings": {**shared, "budgets": list(outcomes), "floor": settings.floor, "share": settings.share},
        "unit": settings.unit,
        "origin": dict(origin),
        "needs": _needs(items, needs),
        "rankings": _rankings(items, settings, counts),
        "predictors": [
            {
                "name": one.name,
                "kind": one.kind,
                "form": one.form,
                "spearman": _spearman(one, needs, counts, settings.unit),
                "budgets": {label: by_name[one.name] for label, by_name in outcomes.items()},
            }
            for one in found
        ],
    }


def _labelled(settings: HeadSettings) -> dict[str, Any]:
    return {budget_label(budget): budget for budget in settings.budgets}


def _estimated(values: Sequence[float], counts: Any, unit: str) -> dict[str, float | int]:
    found = estimate(values, counts)
    if found is None:
        raise ValueError("nothing was measured")
    return found.to_dict(unit)


def _spearman(one: Predictor, needs: Sequence[Tensor], counts: Any, unit: str) -> dict[str, Any]:
    """Rank correlation with the need; None where no item's heads differ in their need."""
    if one.name == SHUFFLED:  # the mean over all permutations
        return {scope: dict.fromkeys(("mean", "low", "high"), 0.0) for scope in SCOPES}
    pairs = [(prediction.need.double(), need) for prediction, need in zip(one.predictions, needs, strict=True)]
    whole = [spearman(left.flatten(), right.flatten()) for left, right in pairs]
    within = [spearman_within(left, right) for left, right in pairs]
    return {"model": _estimated_known(whole, counts, unit), "layer": _estimated_known(within, counts, unit)}


def _estimated_known(values: Sequence[float | None], counts: Any, unit: str) -> dict[str, float | int] | None:
    numbers: Values = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    known = ~np.isnan(numbers)
    found = estimate(np.where(known, numbers, 0.0), counts, known)
    return None if found is None else found.to_dict(unit)


def _outcomes(
    found: Sequence[Predictor], items: Sequence[Measured], settings: HeadSettings, budget: Any, counts: Any
) -> dict[str, dict[str, Any]]:
    """By predictor and scope what the same total retains if it is divided by what is predicted."""
    measures: dict[str, dict[str, Measures]] = {one.name: {scope: {} for scope in SCOPES} for one in found}
    for index, item in enumerate(items):
        limit = item.future.shape[-1]
        mean = mean_entries(budget, item.entries, limit)
        sizes = {"mean": mean, "floor": round(settings.floor * mean)}
        for scope in SCOPES:
            best, ranked = in_scope(item.future, scope), in_scope(item.ranked[LAST_ROW], scope)
            most = retained(best, water_filled(best, **sizes))
            equal = torch.full(best.shape[:2], mean)
            uniform, uniform_ranked = retained(best, equal), retained(ranked, equal)
            for one in found:
                targets = one.predictions[index].targets(scope, limit=limit, **sizes)
                keep = retained_if_shuffled if one.name == SHUFFLED else retained
                held = keep(best, targets)
                values = {
                    "retained": held,
                    "regret": most - held,
                    "over_uniform": held - uniform,
                    "ranked_over_uniform": keep(ranked, targets) - uniform_ranked,
                }
                for name, value in values.items():
                    measures[one.name][scope].setdefault(name, []).append(value)
    return {
        predictor: {
            scope: {name: _estimated(values, counts, settings.unit) for name, values in by_measure.items()}
            for scope, by_measure in by_scope.items()
        }
        for predictor, by_scope in measures.items()
    }


def _rankings(items: Sequence[Measured], settings: HeadSettings, counts: Any) -> list[dict[str, Any]]:
    """What every ranking loses of what the best entries retain, with the same number of entries for every head."""
    table = []
    for name in items[0].ranked:
        lost: dict[str, Any] = {}
        for label, budget in _labelled(settings).items():
            values = []
            for item in items:
                mean = mean_entries(budget, item.entries, item.future.shape[-1])
                equal = torch.full(item.future.shape[:2], mean)
                values.append(retained(item.future, equal) - retained(item.ranked[name], equal))
            lost[label] = _estimated(values, counts, settings.unit)
        table.append({"name": name, "lost": lost})
    return table


def _needs(items: Sequence[Measured], needs: Sequence[Tensor]) -> dict[str, Any]:
    """Needs by layer and head, early and late, and how much of the differences the head itself explains."""
    late = torch.stack(list(needs))  # [items, L, G]
    early = torch.stack([early_need(item.statistics) for item in items]).double()
    means = late.mean(0)
    spread = float(((late - late.mean()) ** 2).mean())
    between = float(((means - late.mean()) ** 2).mean())
    return {
        "early": early.mean(0).tolist(),
        "late": means.tolist(),
        "early_entries": sum(item.window.shape[-1] for item in items) / len(items),
        "late_entries": sum(item.future.shape[-1] for item in items) / len(items),
        "stays_anyway": (1 - torch.stack([item.future.double().sum(-1) for item in items]).mean(0)).tolist(),
        "explained_by_head": between / spread if spread else None,
    }
