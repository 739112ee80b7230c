# SPDX-License-Identifier: Apache-2.0
"""What was measured on one caption or document, and the files it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headkv_mm.evaluation.heads.attending import RecordedRow
from headkv_mm.evaluation.heads.needs import Future, future_gains
from headkv_mm.evaluation.heads.pointed import Behind
from headkv_mm.evaluation.heads.rankings import scores_before, value_sizes
from headkv_mm.evaluation.heads.statistics import Seen, statistics
from headkv_mm.evaluation.storage import check_same, write_atomically

_CURVES = ("future", "window", "valued")
_NAMED = ("ranked", "statistics")


@dataclass(frozen=True)
class Measured:
    """Heads of one caption or document.

    Attributes:
        future: [L, G, N] float32, what each further entry retains, the best first; see `needs.Future`.
        ranked: by name of a ranking [L, G, N] float32, the same in that order.
        window: [L, G, n] float32, attention of the last row's queries to the best entries, falling.
        valued: [L, G, n] float32, that attention times the size of the projected value, falling.
        statistics: by name [L, G] float32.
        entries: of a head with a full cache, which budgets are shares of.
    """

    future: Tensor
    ranked: dict[str, Tensor]
    window: Tensor
    valued: Tensor
    statistics: dict[str, Tensor]
    entries: int


def measure(
    layers: Sequence[RecordedRow],
    grams: Sequence[Tensor],
    *,
    decided: int,
    row: int,
    behind: Behind,
    stretches: Sequence[tuple[int, int]],
    entries: int,
) -> Measured:
    """Measure one recorded row, layer by layer.

    Args:
        layers: of one caption or document.
        grams: [G, R, D, D] of every layer.
        decided: entries when the method decides.
        row: queries of a row or window.
        behind: the queries that are asked one by one when the method decides.
        stretches: of the rest of the generation, see `needs.future_gains`.
        entries: of a head with a full cache.
    """
    futures: list[Future] = []
    looks: list[Seen] = []
    for layer, gram in zip(layers, grams, strict=True):
        sizes = value_sizes(layer, gram)
        futures.append(future_gains(layer, stretches, scores_before(layer, stretches, row, sizes)))
        looks.append(Seen.at(layer, end=decided, row=row, sizes=sizes, behind=behind))
    return Measured(
        future=_stacked([one.best for one in futures]),
        ranked=_by_name([one.ranked for one in futures]),
        window=_stacked([_falling(seen.entries) for seen in looks]),
        valued=_stacked([_falling(seen.valued) for seen in looks]),
        statistics=_by_name([statistics(seen) for seen in looks]),
        entries=entries,
    )


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    # Layers may lie on different devices.
    return torch.stack([layer.cpu() for layer in layers])


def _by_name(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _stacked([layer[name] for layer in layers]) for name in layers[0]}


def _falling(values: Tensor) -> Tensor:
    return values.sort(dim=-1, descending=True).values


def write_measured(path: Path, items: Sequence[Measured], settings: Mapping[str, Any]) -> None:
    """Write items with the settings that they came from."""
    header = {
        "settings": json.dumps(settings, sort_keys=True),
        **{name: json.dumps(list(getattr(items[0], name))) for name in _NAMED},
        "entries": json.dumps([item.entries for item in items]),
    }
    tensors = {}
    for index, item in enumerate(items):
        for name in _CURVES:
            tensors[f"{index}.{name}"] = getattr(item, name).contiguous()
        for name in _NAMED:
            tensors[f"{index}.{name}"] = torch.stack(list(getattr(item, name).values()))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read_measured(path: Path, settings: Mapping[str, Any]) -> list[Measured] | None:
    """Items of a file; None if there is no such file.

    Raises:
        ValueError: if it is unreadable or came from other settings.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            check_same(path, json.loads(header.get("settings", "{}")), settings)
            names = {name: json.loads(header[name]) for name in _NAMED}
            items = []
            for index, entries in enumerate(json.loads(header["entries"])):
                curves = {name: file.get_tensor(f"{index}.{name}") for name in _CURVES}
                ranked, known = (
                    dict(zip(names[name], file.get_tensor(f"{index}.{name}"), strict=True)) for name in _NAMED
                )
                items.append(Measured(**curves, ranked=ranked, statistics=known, entries=entries))
            return items
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to measure again") from error
