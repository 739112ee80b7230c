# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: pipelines and the command line -> the core -> kernels, and kernels know tensors only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"headkv_mm": "headkv_mm", "headkv_mm.kernels": "kernels", "headkv_mm.pipelines": "pipelines"}

# These two name the pipelines and the command line, and import them when they are asked for.
DOORS = ("headkv_mm", "headkv_mm._registration")

COMMAND_LINE = ("headkv_mm.cli", "headkv_mm.commands")


def module_names(package: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the dotted name and the file of every module of a package."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imported(name: str, path: Path, source: str) -> Iterator[tuple[str, int]]:
    """Yields every module that a file imports, wherever in the file, with the line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            # `from a import b` may import the module a.b.
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def forbidden(importer: str, target: str) -> bool:
    """Whether a module of ours may not import `target`."""
    if within(importer, "headkv_mm.kernels"):
        outside = within(target, "headkv_mm") and not within(target, "headkv_mm.kernels")
        return outside or any(within(target, name) for name in ("transformers", "diffusers", "accelerate"))
    command_line = any(within(target, package) for package in COMMAND_LINE)
    if within(importer, "headkv_mm.pipelines"):
        return command_line
    if importer in DOORS or any(within(importer, package) for package in COMMAND_LINE):
        return False
    return command_line or within(target, "headkv_mm.pipelines") or target == "headkv_mm.pipeline"


ALL_MODULES = [pair for package, folder in PACKAGES.items() for pair in module_names(package, ROOT / folder)]


@pytest.mark.parametrize(("name", "path"), ALL_MODULES, ids=[name for name, _ in ALL_MODULES])
def test_imports_go_one_way(name: str, path: Path) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for target, line in imported(name, path, path.read_text(encoding="utf-8"))
        if forbidden(name, target)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "statement", "is_wrong"),
    [
        ("headkv_mm.kernels.dispatch", "from headkv_mm.ragged import RaggedKV", True),
        ("headkv_mm.kernels.dispatch", "from .. import ragged", True),
        ("headkv_mm.kernels.cpu.jit", "from ..reference import ragged_decode", False),
        ("headkv_mm.kernels.dispatch", "import transformers.cache_utils", True),
        ("headkv_mm.cache", "from headkv_mm import pipelines", True),
        ("headkv_mm.cache", "from .pipelines.factory import pipeline", True),
        ("headkv_mm.cache", "from headkv_mm import kernels", False),
        ("headkv_mm.cache", "def late():\n    import headkv_mm.cli", True),
        ("headkv_mm.pipelines.factory", "from headkv_mm.commands import plan", True),
        ("headkv_mm.pipelines.factory", "from headkv_mm.cache import HeadKVCache", False),
        ("headkv_mm.cli", "from headkv_mm.pipelines import pipeline", False),
    ],
)
def test_the_rule_itself(importer: str, statement: str, is_wrong: bool) -> None:
    targets = [target for target, _ in imported(importer, Path("module.py"), statement)]
    assert any(forbidden(importer, target) for target in targets) is is_wrong


def test_only_the_doors_import_lazily_what_lies_above() -> None:
    source = (ROOT / "headkv_mm" / "_registration.py").read_text(encoding="utf-8")
    targets = [target for target, _ in imported("headkv_mm._registration", Path("_registration.py"), source)]
    assert not [target for target in targets if within(target, "headkv_mm")]
