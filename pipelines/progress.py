# SPDX-License-Identifier: Apache-2.0
"""A progress bar over image tokens, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def token_bar(total: int | None, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar that counts image tokens.

    Args:
        total: tokens of all images, or None if nobody knows.
        show: draw the bar; if False nothing is imported or printed.

    Yields:
        A function that takes the number of new tokens.
    """
    if not show:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="token", desc="image tokens", leave=False) as bar:
        yield lambda count: bar.update(count)
