# SPDX-License-Identifier: Apache-2.0
"""Which versions of what are installed."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "torch",
    "transformers",
    "numba",
    "triton",
    "numpy",
    "safetensors",
    "accelerate",
    "diffusers",
    "pillow",
    "pypdf",
)


def versions() -> dict[str, str | None]:
    """Versions of this library, Python and the packages it builds on; None for one that is not installed."""
    from headkv_mm import __version__

    found: dict[str, str | None] = {"headkv-mm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
