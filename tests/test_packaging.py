# SPDX-License-Identifier: Apache-2.0
"""What is built is what lies in the repository: every package, the weights, the licence line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"headkv_mm": "headkv_mm", "kernels": "headkv_mm/kernels", "pipelines": "headkv_mm/pipelines"}
LICENCE = "# SPDX-License-Identifier: Apache-2.0"


def python_files() -> list[Path]:
    """Returns the Python files of the repository, generated and ignored folders apart."""
    tops = ("headkv_mm", "kernels", "pipelines", "tests", "scripts", "benchmarks", "docs", "examples")
    return sorted([*ROOT.glob("*.py"), *(path for top in tops for path in (ROOT / top).rglob("*.py"))])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Builds a wheel from a copy of the sources and returns the names of its files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / name).as_posix()}"
        for name, inside in FOLDERS.items()
        for path in (ROOT / name).rglob("*.py")
    }
    assert {name for name in wheel if name.endswith(".py")} == expected


def test_the_wheel_holds_the_weights_and_the_type_marker(wheel: set[str]) -> None:
    weights = {f"headkv_mm/{path.relative_to(ROOT / 'headkv_mm').as_posix()}" for path in weight_files()}
    assert weights
    assert weights <= wheel
    assert "headkv_mm/py.typed" in wheel


def test_the_wheel_installs_nothing_beside_the_package(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"headkv_mm"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def weight_files() -> list[Path]:
    return [path for path in (ROOT / "headkv_mm" / "demo" / "weights").rglob("*") if path.is_file()]


def test_weights_are_safetensors_and_text() -> None:
    allowed = {".safetensors", ".json", ".md", ".txt"}
    assert not [path for path in weight_files() if path.suffix not in allowed]


@pytest.mark.parametrize("top", FOLDERS)
def test_every_folder_with_modules_is_a_package(top: str) -> None:
    folders = {path.parent for path in (ROOT / top).rglob("*.py")}
    assert folders
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_every_python_file_states_the_licence() -> None:
    files = python_files()
    assert len(files) > 20
    without = []
    for path in files:
        with path.open(encoding="utf-8") as text:
            first = next(text, "")
            if first.startswith("#!"):
                first = next(text, "")
        if first.rstrip("\n") != LICENCE:
            without.append(str(path.relative_to(ROOT)))
    assert not without


def test_installed_versions_satisfy_the_declared_ranges() -> None:
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    for text in requires("headkv-mm") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), text


def pins_of(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("older", ["", "-transformers-5.5", "-transformers-5.17"])
def test_constraints_lie_within_the_declared_ranges(older: str) -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    pins = pins_of(ROOT / "constraints.txt")
    overriding = pins_of(ROOT / f"constraints{older}.txt")
    assert set(overriding) <= set(pins)
    pins |= overriding
    declared = [Requirement(text) for text in requires("headkv-mm") or []]
    base = [requirement for requirement in declared if "extra" not in str(requirement.marker or "")]
    assert {requirement.name for requirement in base} <= set(pins)
    for requirement in declared:
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_every_statement_of_the_version_is_the_same() -> None:
    from importlib.metadata import version

    import headkv_mm

    assert headkv_mm.__version__ == version("headkv-mm")
    assert f"\nversion: {headkv_mm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{headkv_mm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
