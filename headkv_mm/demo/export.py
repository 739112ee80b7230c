# SPDX-License-Identifier: Apache-2.0
"""Folders of exported models: whole from the moment they appear, with weights in float16, card and scores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CARD, SCORES = "README.md", "evaluation.json"


@torch.no_grad()
def round_to_float16(model: torch.nn.Module) -> None:
    """Round the parameters to what float16 can hold, so that the scores are those of the exported weights."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


def check_output(folder: Path) -> None:
    """Refuse to replace anything but a model folder.

    Raises:
        ValueError: if `folder` exists and is not a model folder.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise ValueError(f"{folder} exists and is no model folder: choose another output")


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into. It is put in place when the block ends, and is gone if an error leaves the block.

    Args:
        folder: the place; an older model there is replaced.

    Raises:
        ValueError: see `check_output`.
    """
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.replace(folder, replaced)
            os.replace(temporary, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # left over only if something failed


def write_model(model: Any, folder: Path) -> None:
    """Write a float16 model so that it loads as float32 by default: CPUs are slow in float16.

    Args:
        model: a transformers model of float16; its configuration's dtype is changed.
        folder: where to write.
    """
    model.save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def write_texts(folder: Path, card: str, evaluation: dict[str, Any], training: dict[str, Any]) -> None:
    """Write or replace the card and the scores of a model, each file whole.

    Args:
        folder: the model's.
        card: text of the README.
        evaluation: JSON data, what was measured.
        training: JSON data about the training run.
    """
    texts = {SCORES: json.dumps({"training": training, **evaluation}, indent=2) + "\n", CARD: card}
    for name, text in texts.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)
