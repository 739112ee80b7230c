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
    folder = _WEIGHTS / "text_to_image"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded text-to-image model is missing from {folder}: reinstall headkv-mm, or train it with "
            "scripts/train_demo_image.py"
        )
    return folder
