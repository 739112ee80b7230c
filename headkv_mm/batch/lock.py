# SPDX-License-Identifier: Apache-2.0
"""A lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderLock:
    """Held by every process of a run; a second run finds it taken.

    Where the system or the file system has no such locks, nothing is locked.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is locked yet."""
        self.path = path
        self._file: IO[bytes] | None = None

    def take(self, *, shared: bool) -> bool:
        """Take the lock, or change the kind of the one that is held.

        Args:
            shared: with others of the same run; if False, only if nobody else holds it.

        Returns:
            Whether it was free.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        if self._file is None:
            self._file = self.path.open("a+b")  # network file systems want both
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        return True

    def release(self) -> None:
        """Let go."""
        if self._file is not None:
            self._file.close()
            self._file = None
