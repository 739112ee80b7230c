# SPDX-License-Identifier: Apache-2.0
"""The public names: declared once for people, once for type checkers, and never hidden by a sub-module."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import headkv_mm


def test_lists_of_names_agree() -> None:
    tree = ast.parse(Path(headkv_mm.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {
        (alias.asname, node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_type_checkers == set(headkv_mm._PUBLIC.items())
    assert set(headkv_mm.__all__) == {*headkv_mm._PUBLIC, "__version__"}
    assert set(headkv_mm.__all__) <= set(dir(headkv_mm))


def test_no_sub_module_hides_a_public_name() -> None:
    # Importing headkv_mm.x sets the attribute x, whatever it was.
    modules = {module.name for module in pkgutil.iter_modules(headkv_mm.__path__)} | {"kernels", "pipelines"}
    assert not modules & set(headkv_mm.__all__)


@pytest.mark.parametrize("name", sorted(headkv_mm._PUBLIC))
def test_a_public_name_is_the_thing_itself(name: str) -> None:
    value = getattr(headkv_mm, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(importlib.import_module(headkv_mm._PUBLIC[name]), name)
    assert callable(value)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'headkv_mm' has no attribute 'no_such_name'"):
        headkv_mm.no_such_name  # noqa: B018
