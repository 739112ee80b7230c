# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression head by head, for language models and autoregressive image models.

Importing this package registers the attention implementation ``"headkv"`` and the tasks ``"text-to-image"`` and
``"long-document-question-answering"`` with transformers, and nothing else. The public names are imported
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from headkv_mm import _registration

if TYPE_CHECKING:
    from headkv_mm.attach import compress as compress
    from headkv_mm.cache import HeadKVCache as HeadKVCache
    from headkv_mm.compression import Compression as Compression
    from headkv_mm.image_grid import ImageGrid as ImageGrid
    from headkv_mm.memory import plan_memory as plan_memory
    from headkv_mm.pipelines import pipeline as pipeline
    from headkv_mm.registry import methods as methods
    from headkv_mm.registry import register_method as register_method

__version__ = "0.1.0"

# Name -> the module that defines it.
_PUBLIC = {
    "Compression": "headkv_mm.compression",
    "HeadKVCache": "headkv_mm.cache",
    "ImageGrid": "headkv_mm.image_grid",
    "compress": "headkv_mm.attach",
    "methods": "headkv_mm.registry",
    "pipeline": "headkv_mm.pipelines",
    "plan_memory": "headkv_mm.memory",
    "register_method": "headkv_mm.registry",
}

__all__ = [
    "Compression",
    "HeadKVCache",
    "ImageGrid",
    "__version__",
    "compress",
    "methods",
    "pipeline",
    "plan_memory",
    "register_method",
]


if not TYPE_CHECKING:  # a type checker that sees it takes every wrong name, and every sub-module, for an object

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first asked for."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Lists the public names beside what is already imported."""
    return sorted({*globals(), *__all__})


_registration.install()
