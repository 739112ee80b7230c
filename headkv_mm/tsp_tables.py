# SPDX-License-Identifier: Apache-2.0
"""TSP tables: after which layer of one model tokens may be left behind, measured once and kept as a JSON file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .table_files import (
    TableFormat,
    check_fingerprint,
    full_attention_layers,
    read_table,
    table_text,
    text_config,
    typed,
    write_table,
)

FORMAT = TableFormat("TSP table", 1, "make one with `headkv-mm calibrate tsp MODEL --output FILE.json`")


@dataclass(frozen=True)
class TSPTable:
    """How far the model's last hidden state moves, by the layer after which only chosen tokens go on.

    Attributes:
        fingerprint: of the model, see `headkv_mm.fingerprint`.
        distances: [L], |h - h_full| / |h_full| of the prompt's last token after the last layer, mean over the texts.
        tolerance: the largest distance that is good enough.
        ratio: share of the tokens that went on.
        texts: how many were read.
        settings: how it was measured, as JSON types.
        versions: of what was installed then.

    Raises:
        ValueError: if these do not fit together.
    """

    fingerprint: str
    distances: tuple[float, ...]
    tolerance: float
    ratio: float
    texts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.distances or not all(math.isfinite(distance) and distance >= 0 for distance in self.distances):
            raise ValueError("distances must be finite numbers that are not negative, one for every layer")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance}")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be a share in (0, 1], got {self.ratio}")
        if self.texts < 1:
            raise ValueError(f"at least one text must have been read, got {self.texts}")

    @property
    def layer(self) -> int:
        """The first layer after which the distance is within the tolerance; after the last layer it is nothing."""
        good = (layer for layer, distance in enumerate(self.distances) if distance <= self.tolerance)
        return next(good, len(self.distances) - 1)


def save_tsp_table(table: TSPTable, path: str | os.PathLike[str]) -> None:
    """Write a table as JSON; the file appears whole or not at all."""
    fields = asdict(table)
    distances = fields.pop("distances")
    header = {**FORMAT.header(), "fingerprint": fields.pop("fingerprint"), "layer": table.layer, **fields}
    write_table(path, table_text(header, {"distances": list(distances)}))


def load_tsp_table(path: str | os.PathLike[str]) -> TSPTable:
    """Read a table; whether it is the one of a certain model is for `layer_for` to say.

    Raises:
        ValueError: if the file is no TSP table, of another version, or damaged.
        FileNotFoundError: if there is none.
    """
    return read_table(path, FORMAT, _read)


def layer_for(model_or_config: Any, layer: int | None = None, path: str | os.PathLike[str] | None = None) -> int:
    """The layer of a model that chooses: the one given, the table's, or half of the layers less one.

    Args:
        model_or_config: a transformers model; of a configuration alone a table's shape only can be compared.
        layer: from 0.
        path: file of a table.

    Raises:
        ValueError: for a layer that the model does not have, or a table of another model.
        FileNotFoundError: if there is no such table.
    """
    layers = full_attention_layers(text_config(model_or_config))
    if path is not None:
        table = load_tsp_table(path)
        if len(table.distances) != layers:
            raise ValueError(
                f"the TSP table is of another model: it has {len(table.distances)} layers, and the model has {layers}; "
                f"{FORMAT.make_one}"
            )
        check_fingerprint(table.fingerprint, model_or_config, FORMAT)
        layer = table.layer
    if layer is None:
        return max(round(layers / 2) - 1, 0)
    if layer >= layers:
        raise ValueError(f"tsp_layer {layer} is outside the model, whose layers are 0 to {layers - 1}")
    return layer


def _read(content: Mapping[str, Any]) -> TSPTable:
    """A table from what its file holds.

    Raises:
        ValueError: for what does not fit.
        TypeError: for a value of a wrong type.
    """
    table = TSPTable(
        fingerprint=typed(content, "fingerprint", str),
        distances=_numbers(typed(content, "distances", list)),
        tolerance=float(typed(content, "tolerance", float)),
        ratio=float(typed(content, "ratio", float)),
        texts=typed(content, "texts", int),
        settings=typed(content, "settings", dict),
        versions=typed(content, "versions", dict),
    )
    if typed(content, "layer", int) != table.layer:
        raise ValueError(f"layer must be {table.layer} with these distances and this tolerance")
    return table


def _numbers(values: Sequence[object]) -> tuple[float, ...]:
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise TypeError("distances must be numbers")
    return tuple(float(value) for value in values)  # type: ignore[arg-type]
