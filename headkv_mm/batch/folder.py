# SPDX-License-Identifier: Apache-2.0
"""The folder of images: what is finished, and how a batch becomes finished in one step.

    DIR/<id>.png            the images
    DIR/config.json         settings and versions
    DIR/manifest.jsonl      a line per image, in the order of the list; written at the end
    DIR/timings.jsonl       a line per batch: what differs from run to run
    DIR/failed.jsonl        what could not be drawn; only if there is any
    DIR/.headkv-mm/         only while images are missing or a run is interrupted:
        staging/<batch>/    a batch that is being written; worth nothing
        done/<batch>/       a finished batch: records.jsonl, timing.json, and images that are not moved out yet

A batch is written in `staging`, then renamed into `done`. That one step finishes it. Its images are moved out after
it; after a kill the next run moves the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import read_lines, to_line, to_lines, write_atomic, write_synced
from .lock import FolderLock
from .records import Drawn, Failure, Record, make_record, record_name

CONFIG, MANIFEST, TIMINGS, FAILED = "config.json", "manifest.jsonl", "timings.jsonl", "failed.jsonl"
_WORK, _STAGING, _DONE = ".headkv-mm", "staging", "done"
_RECORDS, _TIMING = "records.jsonl", "timing.json"
_PATIENCE = 10.0  # seconds until what another machine wrote must be visible here


class ImageFolder:
    """One output folder, seen by one process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is read or written yet."""
        self.path = Path(path)
        self._work = self.path / _WORK
        self._done = self._work / _DONE
        self._staging = self._work / _STAGING
        self._lock = FolderLock(self._work / "lock")
        self._made: list[Path] = []
        self._opened = False

    def open(self) -> None:
        """Make the folder and take it over from an earlier run. For the main process, before the others `join`.

        Raises:
            OSError: if it cannot be made or written.
            ValueError: if another run is writing it.
        """
        try:
            for folder in reversed([folder for folder in (self.path, *self.path.parents) if not folder.exists()]):
                folder.mkdir()
                self._made.append(folder)
            self._work.mkdir(exist_ok=True)
            free = self._lock.take(shared=False)
        except OSError as error:
            self._remove_made()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if not free:
            self._lock.release()
            raise ValueError(f"{self.path} is being written by another run: wait for its end, or stop it")
        self._opened = True
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)
        for unit in self._finished():
            self._publish(unit)

    def join(self) -> None:
        """Share the folder that the main process has opened.

        Raises:
            ValueError: if this machine does not see it.
        """
        if not _appears(self._staging):
            raise ValueError(f"{self.path} is not the same folder on all machines: use one that all of them see")
        self._lock.take(shared=True)

    def abandon(self) -> None:
        """Let go after an error; the process that opened the folder leaves no empty one behind."""
        self._lock.release()
        if self._opened:
            with contextlib.suppress(OSError):  # a batch may be finished there at this very moment
                self._done.rmdir()
                shutil.rmtree(self._work)
        self._remove_made()

    def read_config(self) -> dict[str, Any] | None:
        """What `config.json` holds; None if there is none, or only half of one."""
        try:
            found = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`."""
        self._replace(CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))

    def records(self) -> dict[str, Record]:
        """The records of all images that are there, by name; damaged records and images are left out."""
        lines = read_lines(self.path / MANIFEST)
        for unit in self._finished():
            lines += read_lines(unit / _RECORDS)
        named = ((record_name(record), record) for record in lines)
        return {name: record for name, record in named if name is not None and self._is_whole(record)}

    def commit(self, drawn: Sequence[Drawn], settings_hash: str, timing: dict[str, Any]) -> None:
        """Finish a batch: one rename, then the images move out one by one."""
        name = f"{uuid.uuid4().hex}-{len(drawn)}"
        staged, unit = self._staging / name, self._done / name
        staged.mkdir()
        for item in drawn:
            write_synced(staged / f"{item.job.name}.png", item.png)
        write_synced(staged / _TIMING, to_line(timing).encode("utf-8"))
        write_synced(staged / _RECORDS, to_lines(make_record(item, settings_hash) for item in drawn))
        os.rename(staged, unit)
        self._publish(unit)

    def count(self) -> int:
        """Images in finished batches that are not in a manifest yet."""
        sizes = (unit.name.rpartition("-")[2] for unit in self._finished())
        return sum(int(size) for size in sizes if size.isdecimal())

    def finish(self, order: Iterable[str], failures: Iterable[Failure]) -> dict[str, Record]:
        """Write manifest, timings and failures and remove the working files. For the main process, at the end.

        Args:
            order: names in the order of the list; images of earlier lists follow, by name.
            failures: what could not be drawn, in the order of the list.

        Returns:
            The records of all images, by name.
        """
        units = self._finished()
        for unit in units:
            self._publish(unit)
        found = self.records()
        first = [name for name in dict.fromkeys(order) if name in found]
        names = [*first, *sorted(set(found) - set(first))]
        self._replace(MANIFEST, to_lines(found[name] for name in names))
        timings = {str(timing.get("batch")): timing for timing in read_lines(self.path / TIMINGS)}
        for unit in units:
            timings.update((unit.name, {"batch": unit.name, **timing}) for timing in read_lines(unit / _TIMING))
        if timings:
            self._replace(TIMINGS, to_lines(timings.values()))
        failed = [failure.to_dict() for failure in failures]
        if failed:
            self._replace(FAILED, to_lines(failed))
        else:
            (self.path / FAILED).unlink(missing_ok=True)
        shutil.rmtree(self._work, ignore_errors=True)
        self._lock.release()
        return {name: found[name] for name in names}

    def _finished(self) -> list[Path]:
        """The folders of finished batches."""
        try:
            return sorted(self._done.iterdir())
        except FileNotFoundError:
            return []

    def _replace(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data, staging=self._staging)

    def _publish(self, unit: Path) -> None:
        """Move the images of a finished batch out."""
        for image in sorted(unit.glob("*.png")):
            os.replace(image, self.path / image.name)

    def _is_whole(self, record: Record) -> bool:
        try:
            return bool((self.path / record["file"]).stat().st_size == record["file_bytes"])
        except OSError:
            return False

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                break  # there is something in it
        self._made.clear()


def _appears(path: Path) -> bool:
    """Whether a path is there, or comes within a few seconds: network file systems take a moment."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
