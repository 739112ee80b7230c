# SPDX-License-Identifier: Apache-2.0
"""Head tables: how much each attention head of one model matters, measured once and kept as a JSON file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

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

SHIPPED = {"r2": "heads.json", "srh": "retrieval_heads.json"}
"""The embedded model's tables lie beside its weights under these names."""
KINDS = tuple(SHIPPED)
"""How the scores were measured, see `headkv_mm.calibration`. "r2": retrieval and reasoning (arXiv 2410.19258); "srh":
semantic retrieval (arXiv 2508.02401)."""

FORMAT = TableFormat("head table", 1, "make one with `headkv-mm heads MODEL --output FILE.json`")


@dataclass(frozen=True)
class HeadTable:
    """Scores of all query heads of one model.

    The layers are the model's full-attention layers in order, those that a `HeadKVCache` compresses.

    Attributes:
        kind: one of `KINDS`.
        fingerprint: of the model, see `headkv_mm.fingerprint`.
        scores: [L][H] numbers that are finite, not negative and not all zero; their scale has no meaning.
        kv_heads: G, KV heads per layer; query heads h*H/G ... (h+1)*H/G - 1 share KV head h.
        examples: prompts that were tried.
        answered: prompts that were answered right, the only ones that count.
        settings: how it was measured, as JSON types.
        versions: of what was installed then.

    Raises:
        ValueError: if these do not fit together.
    """

    kind: str
    fingerprint: str
    scores: tuple[tuple[float, ...], ...]
    kv_heads: int
    examples: int
    answered: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"head tables of kind {self.kind!r} are unknown; known: {', '.join(KINDS)}")
        if not self.scores or not self.scores[0] or any(len(row) != len(self.scores[0]) for row in self.scores):
            raise ValueError("scores must be a list of layers with the same number of query heads each, at least one")
        if self.kv_heads < 1 or self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot be shared among {self.kv_heads} KV heads")
        numbers = [score for row in self.scores for score in row]
        if not all(math.isfinite(score) and score >= 0 for score in numbers):
            raise ValueError("scores must be finite numbers that are not negative")
        if sum(numbers) <= 0:
            raise ValueError("the scores are all zero, so they tell no head from another")
        if not 1 <= self.answered <= self.examples:
            raise ValueError(f"{self.answered} of {self.examples} examples cannot have been answered right")

    @property
    def layers(self) -> int:
        """L, full-attention layers."""
        return len(self.scores)

    @property
    def query_heads(self) -> int:
        """H, query heads per layer."""
        return len(self.scores[0])

    def kv_scores(self) -> Tensor:
        """Scores of the KV heads, [L, G] float64: sums over their query heads, divided by the sum of all."""
        heads = torch.tensor(self.scores, dtype=torch.float64)
        scores: Tensor = heads.reshape(self.layers, self.kv_heads, -1).sum(-1)
        return scores / scores.sum()


def save_head_table(table: HeadTable, path: str | os.PathLike[str]) -> None:
    """Write a table as JSON; the file appears whole or not at all."""
    fields = asdict(table)
    scores = fields.pop("scores")
    header = {
        **FORMAT.header(),
        "kind": fields.pop("kind"),
        "fingerprint": fields.pop("fingerprint"),
        "layers": table.layers,
        "query_heads": table.query_heads,
        **fields,
    }
    write_table(path, table_text(header, {"scores": list(scores)}))


def load_head_table(path: str | os.PathLike[str]) -> HeadTable:
    """Read a table; whether it is the one of a certain model is for `check_head_table` to say.

    Raises:
        ValueError: if the file is no head table, of another version, or damaged.
        FileNotFoundError: if there is none.
    """
    return read_table(path, FORMAT, _read)


def check_head_table(table: HeadTable, model_or_config: Any) -> None:
    """Refuse a table of another model.

    Args:
        table: the table.
        model_or_config: a transformers model; of a configuration alone only the shape can be compared.

    Raises:
        ValueError: if the shape or the fingerprint differs.
    """
    found = (table.layers, table.query_heads, table.kv_heads)
    wanted = _shape(text_config(model_or_config), table.kv_heads)
    if found != wanted:
        kinds = ("layers", "query heads", "KV heads")
        has = ", ".join(f"{number} {kind}" for number, kind in zip(found, kinds))
        needs = ", ".join(f"{number} {kind}" for number, kind in zip(wanted, kinds))
        raise ValueError(
            f"the head table is of another model: it has {has}, and the model has {needs}; {FORMAT.make_one}"
        )
    check_fingerprint(table.fingerprint, model_or_config, FORMAT)


def head_table_for(model_or_config: Any, table: str | os.PathLike[str] | None = None, kind: str = "r2") -> HeadTable:
    """The head table to use with a model.

    Args:
        model_or_config: a transformers model; a configuration will do if `table` is given.
        table: file of a table; None for the one that ships with the embedded language model.
        kind: how its scores must have been measured.

    Raises:
        ValueError: if the table is of another model or unreadable, or if none is given and none ships for this model.
        FileNotFoundError: if there is no such file.
    """
    if table is not None:
        found = load_head_table(table)
        if found.kind != kind:
            raise ValueError(
                f"{os.fspath(table)} is a head table of kind {found.kind!r}, and this method needs {kind!r}: "
                f"{_make_one(kind)}"
            )
        check_head_table(found, model_or_config)
        return found
    shipped = shipped_table(model_or_config, SHIPPED[kind], load_head_table, check_head_table)
    if shipped is not None:
        return shipped
    raise ValueError(f"there is no head table for this model; {_make_one(kind)} and pass table='FILE.json'")


def _make_one(kind: str) -> str:
    option = "" if kind == "r2" else f" --kind {kind}"
    return f"make one with `headkv-mm heads MODEL{option} --output FILE.json`"


def _read(content: Mapping[str, Any]) -> HeadTable:
    """A table from what its file holds.

    Raises:
        ValueError: for what is missing or does not fit.
        TypeError: for a value of a wrong type.
    """
    texts = {name: typed(content, name, str) for name in ("kind", "fingerprint")}
    numbers = {
        name: typed(content, name, int) for name in ("layers", "query_heads", "kv_heads", "examples", "answered")
    }
    mappings = {name: typed(content, name, dict) for name in ("settings", "versions")}
    layers, query_heads = numbers.pop("layers"), numbers.pop("query_heads")
    scores = tuple(_row(row) for row in typed(content, "scores", list))
    if len(scores) != layers or any(len(row) != query_heads for row in scores):
        raise ValueError(f"scores must have {layers} layers of {query_heads} query heads")
    return HeadTable(scores=scores, **texts, **numbers, **mappings)


def _row(row: object) -> tuple[float, ...]:
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise TypeError("every layer of the scores must be a list")
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in row):
        raise TypeError("scores must be numbers")
    return tuple(float(score) for score in row)


def _shape(config: Any, kv_heads: int) -> tuple[int, int, int]:
    """Full-attention layers, query heads and KV heads; `kv_heads` if the configuration has no plain number of them."""
    kv = int(getattr(config, "num_key_value_heads", None) or kv_heads)
    return full_attention_layers(config), int(config.num_attention_heads), kv
