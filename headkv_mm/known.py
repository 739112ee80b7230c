# SPDX-License-Identifier: Apache-2.0
"""What a method's pieces know of a model, from its tables say, as JSON: with it a saved cache needs no table again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .registry import PIECES, Pieces
from .table_files import tuples

Known = Mapping[str, Mapping[str, Any]]
"""Values by piece ("scorer", ...) and field."""


def known_of(bound: Pieces, stated: Pieces) -> dict[str, dict[str, Any]]:
    """The fields that `Pieces.for_model` has set; those that JSON cannot hold are for `for_model` to set again.

    Args:
        bound: the pieces that a cache works with.
        stated: the same before they knew the model.
    """
    found = {name: _changed(getattr(bound, name), getattr(stated, name)) for name in PIECES}
    return {name: values for name, values in found.items() if values}


def with_known(stated: Pieces, known: Known) -> Pieces:
    """The pieces with these fields set.

    Raises:
        ValueError: for pieces or fields that the method does not have, or values that they refuse.
    """
    try:
        changed: dict[str, Any] = {
            name: replace(getattr(stated, name), **{field: tuples(value) for field, value in values.items()})
            for name, values in known.items()
        }
        return replace(stated, **changed)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"what is known of the model does not fit the method: {error}") from error


def _changed(bound: Any, stated: Any) -> dict[str, Any]:
    values = {field.name: getattr(bound, field.name) for field in fields(bound) if field.init}
    return {name: value for name, value in values.items() if _is_json(value) and value != getattr(stated, name)}


def _is_json(value: Any) -> bool:
    try:
        return bool(tuples(json.loads(json.dumps(value))) == value)
    except (TypeError, ValueError):
        return False
