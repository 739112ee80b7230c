# SPDX-License-Identifier: Apache-2.0
"""Devices named on the command line."""

from __future__ import annotations


def usable_device(name: str) -> str:
    """A device that is there.

    Raises:
        ValueError: if torch does not know it, or the machine does not have it.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name
