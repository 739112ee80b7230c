# SPDX-License-Identifier: Apache-2.0
"""Where results come from: versions and commit; which model they are of says `headkv_mm.fingerprint`."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import headkv_mm

_PACKAGES = ("torch", "transformers", "numpy", "numba", "triton")


def versions() -> dict[str, str | None]:
    """Versions of what computes, by package; None where one is not installed."""
    found: dict[str, str | None] = {"headkv-mm": headkv_mm.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of this package's working tree, with "+changes" if it differs; None outside of one."""
    folder = Path(headkv_mm.__file__).parent
    try:
        # A package installed into somebody else's working tree is not that tree's commit.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
        return _git(folder, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
