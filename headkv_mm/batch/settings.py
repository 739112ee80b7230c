# SPDX-License-Identifier: Apache-2.0
"""What all images of a folder have in common, as `config.json` holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SETTINGS, HASH, MADE_WITH = "settings", "settings_hash", "made_with"


@dataclass(frozen=True)
class BatchSettings:
    """Settings of a folder.

    Attributes:
        values: what decides about the bytes of an image beside its prompt and seed: a folder has one value of each.
        made_with: versions and device. They may change the last bits of a number, so a run that goes on with others
            says so, and goes on.
    """

    values: Mapping[str, Any]
    made_with: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that stand for the values."""
        text = json.dumps(_plain(self.values), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {SETTINGS: _plain(self.values), HASH: self.hash, MADE_WITH: _plain(self.made_with)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BatchSettings | None:
        """Read a `config.json`; None if it is none of ours."""
        values, made_with = config.get(SETTINGS), config.get(MADE_WITH)
        if not isinstance(values, dict) or not isinstance(made_with, dict):
            return None
        found = cls(values, made_with)
        return found if config.get(HASH) == found.hash else None


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """What differs between two settings, one text for each: "kv_budget 0.25, now 0.5"."""
    there, here = _plain(there), _plain(here)
    found: list[str] = []
    for name in dict.fromkeys((*there, *here)):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, prefix=f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} {_said(old)}, now {_said(new)}")
    return found


def _said(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from JSON: tuples as lists, anything else as text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=repr))
    return plain
