# SPDX-License-Identifier: Apache-2.0
"""Tables of the embedded image model against one twice as deep; `update_docs.py` puts them into docs/head_types.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from result_files import load

from headkv_mm.demo import image_model_path
from headkv_mm.evaluation.heads.tables import number
from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import interval, percent, table

TAUS = (0.5, 0.7, 0.9)
"""The last is that of the paper's rule as `headkv` has it."""
SHOWN = ("backward tokens, tau 0.9, 1 row", "best entries, tau 0.9, 1 row", "pointed attention")


@dataclass(frozen=True)
class Model:
    """What was measured of one model.

    Attributes:
        training: how it was trained, as its folder says.
        heads: `results.json` of `headkv-mm evaluate heads images`.
        images: `results.json` of `headkv-mm evaluate images`.
    """

    training: Mapping[str, Any]
    heads: Mapping[str, Any]
    images: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its depth."""
        return f"{len(self.heads['needs']['late'])} layers"

    @property
    def needs(self) -> list[float]:
        """Mean need of every head, in entries."""
        return [need for layer in self.heads["needs"]["late"] for need in layer]

    def predictor(self, name: str) -> Mapping[str, Any]:
        """What was found of a predictor."""
        found: Mapping[str, Any] = next(one for one in self.heads["predictors"] if one["name"] == name)
        return found


def models() -> list[Model]:
    """The embedded model and the deep one."""
    return [
        Model(
            load(str(image_model_path() / "evaluation.json"))["training"],
            load("heads_images/results.json"),
            load("images_seed_11/results.json"),
        ),
        Model(
            load("images_deep/evaluation.json")["training"],
            load("heads_images_deep/results.json"),
            load("images_deep/results.json"),
        ),
    ]


def depth() -> str:
    """What heads need in both models, how much they differ, and what foretells it."""
    both = models()
    rows = [
        ["KV heads", *(f"{len(one.needs)}" for one in both)],
        ["training images", *(f"{one.training['images']:,}" for one in both)],
        ["of them with dropout of past entries", *(f"{one.training['forgetful_images']:,}" for one in both)],
        ["full cache, images all right", *(_right(one, FULL, None) for one in both)],
        ["`headkv` 1/8, images all right", *(_right(one, "headkv", 1 / 8) for one in both)],
        [
            "mean need of a head, least to most",
            *(f"{min(one.needs):.1f} to {max(one.needs):.1f}" for one in both),
        ],
        [
            "mean need of all heads",
            *(f"{sum(one.needs) / len(one.needs):.1f} of {one.heads['needs']['late_entries']:.0f}" for one in both),
        ],
        ["spread over the heads, coefficient of variation", *(f"{variation(one.needs):.2f}" for one in both)],
        ["the same, Gini", *(f"{gini(one.needs):.2f}" for one in both)],
        ["variance that the head explains", *(percent(one.heads["needs"]["explained_by_head"], 0) for one in both)],
        *([f"Spearman: {name}", *(_rank(one, name) for one in both)] for name in (*SHOWN, "calibrated table of needs")),
        *(
            [f"regret of the same number for every head, {budget}", *(_regret(one, "uniform", budget) for one in both)]
            for budget in ("1/8", "1/16")
        ),
        *(
            [
                f"regret of a calibrated table, {budget}",
                *(_regret(one, "calibrated table of needs", budget) for one in both),
            ]
            for budget in ("1/8", "1/16")
        ),
    ]
    return table(["", *(one.name for one in both)], rows)


def labels() -> str:
    """Local heads by the paper's rule, early and after the last row, and labels that changed."""
    both = models()
    rows = []
    for at, run in enumerate(both[0].images["runs"]):
        if run["method"] == FULL:
            continue
        for line, line_deep in zip(run["labels"], both[1].images["runs"][at]["labels"], strict=True):
            if line["tau"] not in TAUS:
                continue
            rows.append(
                [
                    budget_label(run["budget"]),
                    f"{line['tau']:g}",
                    *(
                        percent(one[name])
                        for name in ("local_early", "local_late", "changed")
                        for one in (line, line_deep)
                    ),
                ]
            )
    heads = [f"{what}, {one.name}" for what in ("local, early", "local, last row", "labels changed") for one in both]
    return table(["budget", "tau", *heads], rows)


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean."""
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean)


def gini(values: Sequence[float]) -> float:
    """Half the mean difference of two values over their mean: 0 if all are equal, towards 1 if one has everything."""
    pairs = sum(abs(one - other) for one in values for other in values)
    return pairs / (2 * len(values) * sum(values))


def _right(one: Model, method: str, budget: float | None) -> str:
    run = next(run for run in one.images["runs"] if run["method"] == method and run["budget"] == budget)
    return interval(run["summary"]["outcomes"]["all_right"])


def _rank(one: Model, name: str) -> str:
    return number(one.predictor(name)["spearman"]["model"])


def _regret(one: Model, name: str, budget: str) -> str:
    return number(one.predictor(name)["budgets"][budget]["model"]["regret"], 100)
