# SPDX-License-Identifier: Apache-2.0
"""Layer tables: how much each layer of one model suffers from eviction, measured once and kept as a JSON file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .allocators.layer_table import checked_errors
from .table_files import (
    TableFormat,
    check_fingerprint,
    full_attention_layers,
    read_table,
    shipped_table,
    table_text,
    text_config,
    typed,
    write_table,
)

SHIPPED_NAME = "layers.json"
"""The embedded model's table lies beside its weights under this name."""
FORMAT = TableFormat("layer table", 1, "make one with `headkv-mm calibrate layers MODEL --output FILE.json`")


@dataclass(frozen=True)
class LayerTable:
    """How far each layer's attention output moves when the layer keeps few entries (arXiv 2508.02401).

    The layers are the model's full-attention layers in order, those that a `HeadKVCache` compresses.

    Attributes:
        fingerprint: of the model, see `headkv_mm.fingerprint`.
        errors: [L], |O - O_full| / |O_full| over the tokens that follow the eviction, mean over the texts.
        entries: entries per KV head that each layer kept.
        texts: how many were read.
        settings: how it was measured, as JSON types.
        versions: of what was installed then.

    Raises:
        ValueError: if these do not fit together.
    """

    fingerprint: str
    errors: tuple[float, ...]
    entries: int
    texts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_errors(self.errors)
        if self.entries < 1 or self.texts < 1:
            raise ValueError(f"entries and texts must be at least 1, got {self.entries} and {self.texts}")


def save_layer_table(table: LayerTable, path: str | os.PathLike[str]) -> None:
    """Write a table as JSON; the file appears whole or not at all."""
    fields = asdict(table)
    errors = fields.pop("errors")
    write_table(path, table_text({**FORMAT.header(), **fields}, {"errors": list(errors)}))


def load_layer_table(path: str | os.PathLike[str]) -> LayerTable:
    """Read a table; whether it is the one of a certain model is for `layer_table_for` to say.

    Raises:
        ValueError: if the file is no layer table, of another version, or damaged.
        FileNotFoundError: if there is none.
    """
    return read_table(path, FORMAT, _read)


def layer_table_for(model_or_config: Any, table: str | os.PathLike[str] | None = None) -> LayerTable:
    """The layer table to use with a model.

    Args:
        model_or_config: a transformers model; a configuration will do if `table` is given.
        table: file of a table; None for the one that ships with the embedded language model.

    Raises:
        ValueError: if the table is of another model or unreadable, or if none is given and none ships for this model.
        FileNotFoundError: if there is no such file.
    """
    if table is not None:
        found = load_layer_table(table)
        _check(found, model_or_config)
        return found
    shipped = shipped_table(model_or_config, SHIPPED_NAME, load_layer_table, _check)
    if shipped is not None:
        return shipped
    raise ValueError(f"there is no layer table for this model; {FORMAT.make_one} and pass layer_table='FILE.json'")


def _check(table: LayerTable, model_or_config: Any) -> None:
    layers = full_attention_layers(text_config(model_or_config))
    if len(table.errors) != layers:
        raise ValueError(
            f"the layer table is of another model: it has {len(table.errors)} layers, and the model has {layers} "
            f"with full attention; {FORMAT.make_one}"
        )
    check_fingerprint(table.fingerprint, model_or_config, FORMAT)


def _read(content: Mapping[str, Any]) -> LayerTable:
    """A table from what its file holds.

    Raises:
        ValueError: for what is missing or does not fit.
        TypeError: for a value of a wrong type.
    """
    return LayerTable(
        fingerprint=typed(content, "fingerprint", str),
        errors=checked_errors(typed(content, "errors", list)),
        entries=typed(content, "entries", int),
        texts=typed(content, "texts", int),
        settings=typed(content, "settings", dict),
        versions=typed(content, "versions", dict),
    )
