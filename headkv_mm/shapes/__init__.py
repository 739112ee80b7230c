# SPDX-License-Identifier: Apache-2.0
"""Sizes of published models: to plan memory for them, and to measure with random weights of the same shape."""

from __future__ import annotations

from functools import cache

from headkv_mm.shapes.image_shapes import image_shapes
from headkv_mm.shapes.shape import Shape
from headkv_mm.shapes.text_shapes import text_shapes

__all__ = ["Shape", "get_shape", "shapes"]


@cache
def shapes() -> dict[str, Shape]:
    """All shapes by name, image models first."""
    return {shape.name: shape for shape in (*image_shapes(), *text_shapes())}


def get_shape(name: str) -> Shape:
    """A shape by its name; capitals do not matter.

    Raises:
        ValueError: if there is none.
    """
    found = shapes().get(name.lower())
    if found is None:
        raise ValueError(f"there is no shape {name!r}; the shapes are: {', '.join(shapes())}")
    return found
