# SPDX-License-Identifier: Apache-2.0
"""Small models that ship with the library, and the closed worlds they were trained on."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def image_model_path() -> Path:
    """Folder of the embedded text-to-image model, in the layout that `from_pretrained` reads.

    Raises:
        FileNotFoundError: if the weights were not installed with the library.
    """
    return _model_path("text_to_image", "scripts/train_demo_image.py")


def text_model_path() -> Path:
    """Folder of the embedded language model, in the layout that `from_pretrained` reads.

    Raises:
        FileNotFoundError: if the weights were not installed with the library.
    """
    return _model_path("language", "scripts/train_demo_text.py")


def _model_path(name: str, script: str) -> Path:
    folder = _WEIGHTS / name
    if not (folder / "model.safetensors").is_file():
        kind = name.replace("text_to_image", "text-to-image")
        raise FileNotFoundError(
            f"the embedded {kind} model is missing from {folder}: reinstall headkv-mm, or train it with {script}"
        )
    return folder
