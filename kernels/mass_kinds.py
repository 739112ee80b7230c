# SPDX-License-Identifier: Apache-2.0
"""What a decode step may add to the running number of every slot."""

from __future__ import annotations

from typing import Literal, get_args

MassOf = Literal["attention", "squared_logits"]
"""The slot's attention, or the square of its logit before any softcap; both summed over the group's query heads."""


def adds_squares(mass_of: MassOf) -> bool:
    """True for "squared_logits", False for "attention".

    Raises:
        ValueError: for anything else.
    """
    if mass_of not in get_args(MassOf):
        raise ValueError(f"mass_of must be one of {', '.join(map(repr, get_args(MassOf)))}, got {mass_of!r}")
    return mass_of == "squared_logits"
