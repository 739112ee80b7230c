# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Shared machines are slow now and then; a slow example is not a wrong one.
settings.register_profile("headkv-mm", deadline=None)
settings.load_profile("headkv-mm")

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` on a machine without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
