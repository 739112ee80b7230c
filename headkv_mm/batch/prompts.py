# SPDX-License-Identifier: Apache-2.0
"""Reading a list of prompts: plain text, or one JSON object per line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ids import check_id, same_file

STDIN = "-"
KEYS = ("id", "prompt", "seed", "class")
_SEEDS = 2**63


@dataclass(frozen=True)
class Prompt:
    """One line of a list.

    Attributes:
        line: number of the line, from 1.
        id: name of the image; the line's number with five digits if the line gives none.
        prompt: text, or None for a class.
        label: number of the class, or None for a text.
        seed: of the first image; None for the one of the command.
    """

    line: int
    id: str
    prompt: str | None = None
    label: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used.

    Attributes:
        line: its number, from 1.
        error: what is wrong with it.
    """

    line: int
    error: str


@dataclass(frozen=True)
class PromptList:
    """A list of prompts.

    Attributes:
        source: name for messages.
        lines: every line that is not blank, good or bad, in order.
    """

    source: str
    lines: tuple[Prompt | BadLine, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The good lines."""
        return tuple(line for line in self.lines if isinstance(line, Prompt))

    @property
    def bad(self) -> tuple[BadLine, ...]:
        """The lines that cannot be used."""
        return tuple(line for line in self.lines if isinstance(line, BadLine))


def read_prompts(path: str) -> PromptList:
    """Read a list of prompts.

    Args:
        path: a .txt file with one prompt per line, a .jsonl file with one object per line (`id`, `prompt` or `class`,
            `seed`), or "-" for standard input, which holds objects if its first line begins with a brace.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for another kind of file, a list without a good line, or two lines with one id.
    """
    if path == STDIN:
        data, source = sys.stdin.buffer.read(), "standard input"
        objects = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    else:
        suffix, source = Path(path).suffix.lower(), path
        if suffix not in (".txt", ".jsonl", ""):
            raise ValueError(f"{path}: prompts come from .txt (one per line) or .jsonl (one object per line)")
        data, objects = Path(path).read_bytes(), suffix == ".jsonl"
    return parse_prompts(data, objects=objects, source=source)


def parse_prompts(data: bytes, *, objects: bool, source: str) -> PromptList:
    """The lines of a list; see `read_prompts`.

    Args:
        data: UTF-8 text.
        objects: every line is a JSON object.
        source: name for messages.
    """
    lines: list[Prompt | BadLine] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
            if not text:
                continue
            lines.append(_from_object(number, text) if objects else Prompt(number, _default_id(number), prompt=text))
        except UnicodeDecodeError:
            lines.append(BadLine(number, "is no UTF-8 text"))
        except ValueError as error:
            lines.append(BadLine(number, str(error)))
    found = PromptList(source, tuple(lines))
    if not found.prompts:
        first = f": line {found.bad[0].line}: {found.bad[0].error}" if found.bad else ": write one per line"
        raise ValueError(f"{source} has no prompt that can be used{first}")
    _refuse_duplicates(found)
    return found


def _from_object(number: int, text: str) -> Prompt:
    """One line of a .jsonl file.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(item, dict):
        raise ValueError(f'must be a JSON object such as {{"prompt": "..."}}, got {type(item).__name__}')
    unknown = sorted(set(item) - set(KEYS))
    if unknown:
        raise ValueError(f"has the unknown key {unknown[0]!r}: the keys are {', '.join(KEYS)}")
    given = {key: value for key, value in item.items() if value is not None}
    if ("prompt" in given) == ("class" in given):
        raise ValueError("must have either prompt or class")
    name = given.get("id", _default_id(number))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"id must be text or an integer, got {name!r}")
    return Prompt(
        line=number,
        id=check_id(str(name)),
        prompt=_text(given.get("prompt")),
        label=_integer("class", given.get("class"), limit=None),
        seed=_integer("seed", given.get("seed"), limit=_SEEDS),
    )


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"prompt must be text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("prompt holds half a character (a lone surrogate)") from None
    if not value.strip():
        raise ValueError("prompt is empty: say what to draw")
    return value.strip()


def _integer(name: str, value: Any, *, limit: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < 0 or (limit is not None and value >= limit):
        raise ValueError(f"{name} must be {'at least 0' if limit is None else 'in 0..2**63 - 1'}, got {value}")
    return value


def _default_id(number: int) -> str:
    return f"{number:05d}"


def _refuse_duplicates(found: PromptList) -> None:
    """Refuse a list in which two lines would write one file: nobody can say which of them is meant."""
    seen: dict[str, Prompt] = {}
    for prompt in found.prompts:
        other = seen.setdefault(same_file(prompt.id), prompt)
        if other is not prompt:
            how = "have the same id" if other.id == prompt.id else "have ids that differ in case only,"
            raise ValueError(
                f"{found.source}: lines {other.line} and {prompt.line} {how} {prompt.id!r}: give every prompt its own"
            )
