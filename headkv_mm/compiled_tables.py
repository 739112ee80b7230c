# SPDX-License-Identifier: Apache-2.0
"""Compiled tables: how much the heads of one model count, and which scores are worth keeping, found by roll-outs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .allocators.risk_gate import checked_edges, checked_gate
from .scorers.value_weighted import checked_weights
from .table_files import (
    TableFormat,
    check_fingerprint,
    full_attention_layers,
    read_table,
    shipped_table,
    table_text,
    text_config,
    tuples,
    typed,
    write_table,
)

SHIPPED_NAME = "compiled_tables.json"
"""The embedded model's tables lie beside its weights under this name."""
IDENTITY = "identity"
"""In place of a file: every head counts the same, and nothing is left out."""
FORMAT = TableFormat("compiled table", 1, "make one with `headkv-mm calibrate tables MODEL --output FILE.json`")
_LISTS = ("head_weights", "head_support", "gate", "gate_support", "validation", "log")

Counts = tuple[Any, ...]
"""Whole numbers in the shape of a table."""


@dataclass(frozen=True)
class CompiledTables:
    """Two tables for `compilerkv` (arXiv 2602.08686), and where they come from.

    The layers are the model's full-attention layers in order. A cell that too few roll-outs visited holds the
    identity: a weight of 1, a threshold of 0.

    Attributes:
        fingerprint: of the model, see `headkv_mm.fingerprint`.
        head_weights: [L][G], by which each KV head's scores are multiplied.
        gate: [L][E][P + 1], scores below this do not stay, by bins of entropy and of perplexity; the last one is for
            prompts whose perplexity is not known.
        entropy_edges: [E - 1], ascending, of the normalised entropy of the layer's attention.
        perplexity_edges: [P - 1], ascending, of the prompt's last tokens.
        head_support, gate_support: roll-outs that visited each cell.
        budgets: shares of a prompt that were kept in the roll-outs.
        texts: how many were read for the roll-outs.
        validation: on texts kept apart, by budget, the losses with the full cache, identity tables, and these.
        log: what was found, text by text.
        settings: how it was found, as JSON types.
        versions: of what was installed then.

    Raises:
        ValueError: if these do not fit together.
    """

    fingerprint: str
    head_weights: tuple[tuple[float, ...], ...]
    gate: tuple[tuple[tuple[float, ...], ...], ...]
    entropy_edges: tuple[float, ...]
    perplexity_edges: tuple[float, ...]
    head_support: Counts
    gate_support: Counts
    budgets: tuple[float, ...]
    texts: int
    validation: tuple[Mapping[str, float], ...] = ()
    log: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked_weights(self.head_weights)
        for name in ("entropy_edges", "perplexity_edges"):
            checked_edges(getattr(self, name), name)
        checked_gate(self.gate, len(self.entropy_edges), len(self.perplexity_edges))
        for table, support, name in (
            (self.head_weights, self.head_support, "head_support"),
            (self.gate, self.gate_support, "gate_support"),
        ):
            if _shape(table) != _shape(support):
                raise ValueError(f"{name} must have a number for every cell of its table")
        if len(self.gate) != len(self.head_weights):
            raise ValueError(
                f"both tables must have the same layers, got {len(self.head_weights)} and {len(self.gate)}"
            )
        if not self.budgets or not all(0 < budget < 1 for budget in self.budgets):
            raise ValueError("budgets must be shares between 0 and 1")
        if self.texts < 1:
            raise ValueError(f"at least one text must have been read, got {self.texts}")

    @property
    def layers(self) -> int:
        """Full-attention layers of the model."""
        return len(self.head_weights)

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.head_weights[0])


def save_compiled_tables(tables: CompiledTables, path: str | os.PathLike[str]) -> None:
    """Write the tables as JSON; the file appears whole or not at all."""
    fields = json.loads(json.dumps(asdict(tables), allow_nan=False))  # lists in place of tuples
    header = {**FORMAT.header(), "sha256": _digest(fields)}
    header.update({name: value for name, value in fields.items() if name not in _LISTS})
    write_table(path, table_text(header, {name: fields[name] for name in _LISTS}))


def load_compiled_tables(path: str | os.PathLike[str]) -> CompiledTables:
    """Read tables; whether they are those of a certain model is for `compiled_tables_for` to say.

    Raises:
        ValueError: if the file holds no such tables, is of another version, or was changed after it was written.
        FileNotFoundError: if there is none.
    """
    return read_table(path, FORMAT, _read)


def compiled_tables_for(model_or_config: Any, tables: str | os.PathLike[str] | None = None) -> CompiledTables:
    """The tables to use with a model.

    Args:
        model_or_config: a transformers model; a configuration will do if `tables` is given.
        tables: their file; None for those that ship with the embedded language model.

    Raises:
        ValueError: if they are of another model or unreadable, or if none are given and none ship for this model.
        FileNotFoundError: if there is no such file.
    """
    if tables is not None:
        found = load_compiled_tables(tables)
        check_compiled_tables(found, model_or_config)
        return found
    shipped = shipped_table(model_or_config, SHIPPED_NAME, load_compiled_tables, check_compiled_tables)
    if shipped is not None:
        return shipped
    raise ValueError(
        f"there are no compiled tables for this model; {FORMAT.make_one} and pass tables='FILE.json', or pass "
        f"tables={IDENTITY!r} to do without"
    )


def check_compiled_tables(tables: CompiledTables, model_or_config: Any) -> None:
    """Refuse tables of another model; of a configuration alone only the shape can be compared.

    Raises:
        ValueError: if the shape or the fingerprint differs.
    """
    config = text_config(model_or_config)
    found = (tables.layers, tables.kv_heads)
    wanted = (full_attention_layers(config), int(getattr(config, "num_key_value_heads", None) or tables.kv_heads))
    if found != wanted:
        raise ValueError(
            f"the compiled tables are of another model: they have {found[0]} layers with {found[1]} KV heads, and the "
            f"model has {wanted[0]} with {wanted[1]}; {FORMAT.make_one}"
        )
    check_fingerprint(tables.fingerprint, model_or_config, FORMAT)


def _read(content: Mapping[str, Any]) -> CompiledTables:
    """Tables from what their file holds.

    Raises:
        ValueError: for what does not fit.
        TypeError: for a value of a wrong type.
    """
    stated = {name: value for name, value in content.items() if name not in ("format", "version", "sha256")}
    if _digest(stated) != typed(content, "sha256", str):
        raise ValueError("its content is not what its sha256 says")
    if missing := sorted(set(CompiledTables.__dataclass_fields__) - set(stated)):
        raise TypeError(f"{', '.join(missing)} missing")
    lists = {name: tuples(typed(content, name, list)) for name in (*_LISTS, *_EDGES)}
    return CompiledTables(
        fingerprint=typed(content, "fingerprint", str),
        texts=typed(content, "texts", int),
        settings=typed(content, "settings", dict),
        versions=typed(content, "versions", dict),
        **lists,
    )


_EDGES = ("entropy_edges", "perplexity_edges", "budgets")


def _digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a file says, but for what it is."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _shape(table: Any) -> Any:
    """The lengths of nested sequences, all of them."""
    return [_shape(part) for part in table] if isinstance(table, Sequence) else None
