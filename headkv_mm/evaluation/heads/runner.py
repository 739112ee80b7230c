# SPDX-License-Identifier: Apache-2.0
"""Runs a measurement: some items at a time have their own file, and finished ones are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headkv_mm.evaluation.heads.material import Material
from headkv_mm.evaluation.heads.measured import Measured, read_measured, write_measured
from headkv_mm.evaluation.heads.settings import HeadSettings
from headkv_mm.fingerprint import fingerprint


def shared_settings(model: Any, settings: HeadSettings) -> dict[str, Any]:
    """What all files of a folder have in common, as JSON types."""
    return {
        **settings.measuring(),
        "model": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def measure_all(material: Material, settings: HeadSettings, folder: Path, *, progress: bool = True) -> list[Measured]:
    """Measure what is not finished yet.

    Args:
        material: what is measured.
        settings: how much of it.
        folder: gets a file for every `batch_size` items.
        progress: draw a bar on stderr.

    Raises:
        ValueError: if the folder holds results of other settings.
    """
    from tqdm.auto import tqdm

    shared = shared_settings(material.model, settings)
    starts = range(0, settings.items, settings.batch_size)
    paths = {start: folder / f"{settings.material}-{start:05d}.safetensors" for start in starts}
    # Files of other settings are refused before anything runs, those beyond the number of items too.
    found = {path: read_measured(path, shared) for path in sorted(folder.glob(f"{settings.material}-*.safetensors"))}
    items: list[Measured] = []
    with tqdm(total=settings.items, desc=settings.material, unit="item", disable=not progress) as bar:
        for start, path in paths.items():
            done = found.get(path)
            if done is None:
                done = material.measure(start, min(start + settings.batch_size, settings.items), bar.update)
                write_measured(path, done, shared)
            else:
                bar.update(len(done))
            items += done
    return items
