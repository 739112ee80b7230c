# SPDX-License-Identifier: Apache-2.0
"""Pools evaluations of several seeds: every caption or document of all seeds is one item.

Estimates, paired differences and verdicts come from the items; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headkv_mm.evaluation.bootstrap import estimate, paired_difference, resampling_counts
from headkv_mm.evaluation.settings import FULL

Values = npt.NDArray[np.float64]
Run = Mapping[str, Any]
Key = tuple[str, Any]
"""Method and budget."""

MORE_BYTES = 1.01
"""A rule that holds this many times the bytes of another is said to hold more."""


@dataclass(frozen=True)
class Measure:
    """Something that is measured on every item.

    Attributes:
        name: in results.
        higher_is_better: or lower.
        read: from a run to one number per item; None where the run has none.
    """

    name: str
    higher_is_better: bool
    read: Callable[[Run], Values | None]


@dataclass(frozen=True)
class Material:
    """What evaluations of a kind hold.

    Attributes:
        unit: what the items are.
        measures: the first one decides first.
        groups: from a run to the group of every item; resamples keep the size of every group.
        nbytes: from a run to bytes held, and bytes of a full cache.
        varying: settings that may differ between seeds.
    """

    unit: str
    measures: tuple[Measure, ...]
    groups: Callable[[Run], list[str]]
    nbytes: Callable[[Run], tuple[float, float]]
    varying: tuple[str, ...] = ("seed",)


def _fidelity(run: Run) -> Values | None:
    found = run["fidelity"]
    return None if found is None else np.asarray(found["kl"], np.float64)


def _values(run: Run) -> Values:
    return np.concatenate([np.asarray(cell["partial"], np.float64) for cell in run["cells"].values()])


IMAGES = Material(
    unit="captions",
    measures=(
        Measure("right", True, lambda run: np.asarray(run["outcomes"]["all_right"], np.float64)),
        Measure("kl", False, _fidelity),
    ),
    groups=lambda run: ["captions"] * len(run["outcomes"]["all_right"]),
    nbytes=lambda run: (run["bytes_per_image"]["nbytes"], run["bytes_per_image"]["nbytes_full"]),
)
TEXT = Material(
    unit="documents",
    measures=(
        Measure("right", True, lambda run: (_values(run) == 1).astype(np.float64)),
        Measure("values", True, _values),
    ),
    groups=lambda run: [name for name, cell in run["cells"].items() for _ in cell["partial"]],
    nbytes=lambda run: (
        sum(cell["nbytes"] for cell in run["cells"].values()),
        sum(cell["nbytes_full"] for cell in run["cells"].values()),
    ),
)
MATERIALS = {"images": IMAGES, "text": TEXT}


def pool(contents: Mapping[int, Mapping[str, Any]], kind: str, chosen: str, resamples: int) -> dict[str, Any]:
    """Estimates over the items of all seeds.

    Args:
        contents: what results.json of the evaluation of every seed holds.
        kind: "images" or "text".
        chosen: the method that the others are compared with.
        resamples: of the bootstrap.

    Returns:
        "runs": per method and budget the bytes held, estimates of every measure, and means by seed; "differences": the
        chosen method's less every other's, item by item; "verdicts": see `verdicts`.

    Raises:
        ValueError: if the evaluations do not fit together, or the chosen method is not among them.
    """
    material = MATERIALS[kind]
    by_seed = {seed: _runs(content) for seed, content in contents.items()}
    settings = _same_settings(contents, material)
    keys = list(next(iter(by_seed.values())))
    for seed, runs in by_seed.items():
        if set(runs) != set(keys):
            raise ValueError(f"seed {seed} has other methods or budgets than the first; run all seeds with the same")
    if chosen not in {method for method, _ in keys}:
        raise ValueError(f"the chosen method {chosen!r} was not evaluated; add it to the methods")
    columns = {key: _columns([runs[key] for runs in by_seed.values()], material) for key in keys}
    groups = [group for runs in by_seed.values() for group in material.groups(runs[keys[0]])]
    counts = counts_within(groups, resamples)
    pooled = [
        _pooled(key, {seed: runs[key] for seed, runs in by_seed.items()}, columns[key], counts, material)
        for key in keys
    ]
    return {
        "settings": {**settings, "seeds": list(contents), "chosen": chosen, "resamples": resamples},
        "unit": material.unit,
        "items": len(groups),
        "runs": pooled,
        "differences": _differences(columns, chosen, counts, material),
        "verdicts": verdicts(pooled, chosen, material.measures),
    }


def counts_within(groups: Sequence[str], resamples: int) -> npt.NDArray[np.int64]:
    """How often every item is drawn, [resamples, items]: from every group as many as it has."""
    names = np.asarray(groups)
    counts = np.zeros((resamples, len(names)), dtype=np.int64)
    for index, name in enumerate(dict.fromkeys(groups)):
        members = np.flatnonzero(names == name)
        counts[:, members] = resampling_counts(len(members), resamples, index)
    return counts


def verdicts(runs: Sequence[Run], chosen: str, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """For every budget and measure, where the chosen method's interval lies.

    Args:
        runs: as `pool` returns them.
        chosen: the method.
        measures: what to compare.

    Returns:
        Per budget and measure the methods that it is "better" than, "overlapping" and "worse" than, by intervals that
        do not overlap, and those at whose budget it holds more bytes. The full cache is not among them.
    """
    found = []
    for own in (run for run in runs if run["method"] == chosen):
        others = [run for run in runs if run["budget"] == own["budget"] and run["method"] not in (chosen, FULL)]
        for measure in measures:
            sides: dict[str, list[str]] = {"better": [], "overlapping": [], "worse": []}
            for other in (run for run in others if run[measure.name] is not None):
                sides[side(own[measure.name], other[measure.name], measure.higher_is_better)].append(other["method"])
            more = [run["method"] for run in others if own["bytes_ratio"] > MORE_BYTES * run["bytes_ratio"]]
            found.append({"budget": own["budget"], "measure": measure.name, **sides, "more_bytes_than": more})
    return found


def side(own: Mapping[str, float], other: Mapping[str, float], higher_is_better: bool) -> str:
    """Is an interval "better" or "worse" than another, or are they "overlapping"? Ends that touch overlap."""
    if own["low"] > other["high"]:
        return "better" if higher_is_better else "worse"
    if own["high"] < other["low"]:
        return "worse" if higher_is_better else "better"
    return "overlapping"


def _runs(content: Mapping[str, Any]) -> dict[Key, Run]:
    return {(run["method"], run["budget"]): run for run in content["runs"]}


def _same_settings(contents: Mapping[int, Mapping[str, Any]], material: Material) -> dict[str, Any]:
    """The settings that all evaluations share."""
    shared = [
        {name: value for name, value in content["settings"].items() if name not in (*material.varying, "resamples")}
        for content in contents.values()
    ]
    for seed, one in zip(contents, shared, strict=True):
        if one != shared[0]:
            raise ValueError(f"seed {seed} was evaluated with other settings than the first: {one} and {shared[0]}")
    return shared[0]


def _columns(runs: Sequence[Run], material: Material) -> dict[str, Values | None]:
    found: dict[str, Values | None] = {}
    for measure in material.measures:
        parts = [measure.read(run) for run in runs]
        known = [part for part in parts if part is not None]
        found[measure.name] = np.concatenate(known) if len(known) == len(parts) else None
    return found


def _pooled(
    key: Key, runs: Mapping[int, Run], columns: Mapping[str, Values | None], counts: Any, material: Material
) -> dict[str, Any]:
    method, budget = key
    held = [material.nbytes(run) for run in runs.values()]
    # The seed is an option of the random method, and differs.
    options = {name: value for name, value in next(iter(runs.values()))["options"].items() if name != "seed"}
    means = {
        str(seed): {
            measure.name: float(values.mean())
            for measure in material.measures
            if (values := measure.read(run)) is not None
        }
        for seed, run in runs.items()
    }
    return {
        "method": method,
        "options": options,
        "budget": budget,
        "bytes_ratio": sum(one for one, _ in held) / sum(full for _, full in held),
        **{name: _plain(values, counts, material.unit) for name, values in columns.items()},
        "by_seed": means,
    }


def _differences(
    columns: Mapping[Key, Mapping[str, Values | None]], chosen: str, counts: Any, material: Material
) -> list[dict[str, Any]]:
    found = []
    for (method, budget), own in columns.items():
        if method != chosen:
            continue
        for (other, at), values in columns.items():
            if other == chosen or (other != FULL and at != budget):
                continue
            line: dict[str, Any] = {"budget": budget, "method": other}
            for name, theirs in values.items():
                mine = own[name]
                known = mine is not None and theirs is not None
                difference = paired_difference(mine, theirs, counts) if known else None
                line[name] = None if difference is None else difference.to_dict(material.unit)
            found.append(line)
    return found


def _plain(values: Values | None, counts: Any, unit: str) -> dict[str, float | int] | None:
    found = None if values is None else estimate(values, counts)
    return None if found is None else found.to_dict(unit)
