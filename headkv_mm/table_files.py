# SPDX-License-Identifier: Apache-2.0
"""Files of what was measured once for one model: written whole, refused when foreign, damaged or of another version.

A table is a JSON object whose first fields say what it is and of which model:

    {"format": "headkv-mm head table", "version": 1, "kind": "r2", "fingerprint": "...", ...}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .fingerprint import fingerprint

_MOST_BYTES = 1 << 26
Table = TypeVar("Table")


@dataclass(frozen=True)
class TableFormat:
    """One format of tables.

    Attributes:
        title: what it is called in messages, such as "head table".
        version: of the format.
        make_one: how to make such a table, as the end of a message.
    """

    title: str
    version: int
    make_one: str

    @property
    def name(self) -> str:
        """The file's first field."""
        return f"headkv-mm {self.title}"

    def header(self) -> dict[str, Any]:
        """The first fields of a file."""
        return {"format": self.name, "version": self.version}


def write_table(path: str | os.PathLike[str], text: str) -> None:
    """Write a table's JSON text; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def table_text(header: Mapping[str, Any], rows: Mapping[str, list[Any]]) -> str:
    """JSON text of a table: the header, then lists with one element per line."""
    text = json.dumps(header, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    for name, elements in rows.items():
        lines = ",\n".join(f"  {json.dumps(element, allow_nan=False)}" for element in elements)
        text += f",\n {json.dumps(name)}: [\n{lines}\n ]"
    return f"{text}\n}}\n"


def read_table(path: str | os.PathLike[str], format: TableFormat, make: Callable[[Mapping[str, Any]], Table]) -> Table:
    """Read a table; whether it is the one of a certain model is for `check_fingerprint` to say.

    Args:
        path: the file.
        format: what it must be.
        make: makes the table from the file's content, and raises ValueError or TypeError for what does not fit.

    Raises:
        ValueError: if the file is no such table, of another version, or damaged.
        FileNotFoundError: if there is none.
    """
    name, file = os.fspath(path), Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: there is no such {format.title}; {format.make_one}")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{name} is no {format.title}: it is larger than any could be")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{name} is no {format.title}: {str(error).splitlines()[0]}; {format.make_one}") from None
    if not isinstance(content, dict) or content.get("format") != format.name:
        raise ValueError(f"{name} is no {format.title}; {format.make_one}")
    if content.get("version") != format.version:
        raise ValueError(
            f"{name} has version {content.get('version')!r} of the format, and this package reads {format.version}; "
            f"{format.make_one}"
        )
    try:
        return make(content)
    except (ValueError, TypeError, OverflowError) as error:  # the last one for whole numbers that no float holds
        raise ValueError(f"{name} is damaged: {error}; {format.make_one}") from None


def shipped_table(
    model_or_config: Any, name: str, load: Callable[[Path], Table], check: Callable[[Table, Any], None]
) -> Table | None:
    """The table that ships with the embedded language model, if that is the model.

    Args:
        model_or_config: a transformers model; a configuration alone has no table.
        name: the table's file beside the embedded model's weights.
        load: reads it.
        check: raises ValueError for a table of another model.

    Returns:
        None for another model, or if the embedded one was not installed.

    Raises:
        ValueError: if the file is damaged.
    """
    from .demo import text_model_path

    if not is_model(model_or_config):
        return None
    try:
        found = load(text_model_path() / name)
    except FileNotFoundError:
        return None
    try:
        check(found, model_or_config)
    except ValueError:
        return None
    return found


def typed(content: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of a table.

    Raises:
        TypeError: if it is missing or of another type.
    """
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    return value


def tuples(value: Any) -> Any:
    """The same with tuples in place of lists."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def check_fingerprint(found: str, model_or_config: Any, format: TableFormat) -> None:
    """Refuse a table of another model, or of other weights of it; a configuration alone cannot tell.

    Raises:
        ValueError: if the fingerprint is not the model's.
    """
    if is_model(model_or_config) and found != fingerprint(model_or_config):
        raise ValueError(
            f"the {format.title} was measured on another model, or on other weights of it (its fingerprint is "
            f"{found}, the model's {fingerprint(model_or_config)}); {format.make_one}"
        )


def is_model(model_or_config: Any) -> bool:
    """Is it a model, and no configuration?"""
    return isinstance(model_or_config, torch.nn.Module)


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text part."""
    config = model_or_config.config if is_model(model_or_config) else model_or_config
    return config.get_text_config(decoder=True)


def full_attention_layers(config: Any) -> int:
    """Layers that a `HeadKVCache` compresses."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return sum(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
