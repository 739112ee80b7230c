# SPDX-License-Identifier: Apache-2.0
"""One bar over the images of all processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INTERVAL = 0.5  # seconds


@contextmanager
def image_bar(count: Callable[[], int], *, total: int, show: bool) -> Iterator[None]:
    """Show how many images are there while the caller works.

    Args:
        count: finds out; asked twice a second by a thread of its own.
        total: images of the list.
        show: draw the bar; if False nothing is imported or printed.
    """
    if not show:
        yield
        return
    from tqdm.auto import tqdm

    stop = threading.Event()
    begun = count()
    with tqdm(total=total, initial=begun, unit="image", desc="images") as bar:

        def follow() -> None:
            while not stop.wait(_INTERVAL):
                bar.update(min(count(), total) - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.update(min(count(), total) - bar.n)
