# SPDX-License-Identifier: Apache-2.0
"""A folder whose new files appear all together, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any


class OutputFolder:
    """Collects files beside their destination and moves them there when everything went well.

    The folder is made on entry, so that one that cannot be written is refused before any work. After an exception the
    folder looks as it did before.

    Use as a context manager:

        with OutputFolder("output") as folder:
            image.save(folder.new("image.png"))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the destination; nothing is written yet."""
        self.path = Path(path)
        self._made: list[Path] = []
        self._names: list[str] = []
        self._staging: Path | None = None

    def __enter__(self) -> OutputFolder:
        """Make the folder and the place beside the final files.

        Raises:
            OSError: if the folder cannot be made or written.
        """
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            self._staging = Path(tempfile.mkdtemp(prefix=".headkv-mm-", dir=self.path))
        except OSError as error:
            self._remove_traces()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return self

    def new(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""
        if self._staging is None:
            raise RuntimeError("the output folder is not open: use it in a with statement")
        if name not in self._names:
            self._names.append(name)
        return self._staging / name

    def write_json(self, name: str, data: Any) -> None:
        """Write `data` as readable JSON."""
        self.new(name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Move the files to their names, in the order they were asked for; after an exception remove them."""
        try:
            if kind is None and self._staging is not None:
                for name in self._names:
                    os.replace(self._staging / name, self.path / name)
                self._made.clear()
        finally:
            self._remove_traces()

    def _remove_traces(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                break  # somebody else has put something there
        self._made.clear()
