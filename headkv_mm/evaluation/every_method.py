# SPDX-License-Identifier: Apache-2.0
"""The word "all" in place of names of methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

ALL = "all"


def methods_meant(asked: Sequence[str], model: Any, kind: str) -> tuple[str, ...]:
    """The methods that were asked for; for "all" every registered one that this model can have.

    Methods that need a table which this model does not have are left out of "all", and a line on stderr says so.

    Args:
        asked: registered names, or "all" among them.
        model: what is evaluated.
        kind: "image" or "text".

    Returns:
        Names without repetition, in the order of the registry for "all".
    """
    if ALL not in asked:
        return tuple(dict.fromkeys(asked))
    from headkv_mm.cache import HeadKVCache
    from headkv_mm.registry import methods

    usable = []
    for name in methods(kind):
        try:
            HeadKVCache(model, name)
            usable.append(name)
        except (ValueError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    # A name beside "all" that is not usable is refused where it is used.
    return tuple(dict.fromkeys((*usable, *(name for name in asked if name != ALL))))
