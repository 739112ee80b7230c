# SPDX-License-Identifier: Apache-2.0
"""Images side by side, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TITLE_COLOUR = "#0072B2"


def compare_picture(columns: Sequence[tuple[str, Any, Sequence[str]]], heading: str = "", side: int = 384) -> Any:
    """Images side by side with lines of text under each.

    Args:
        columns: (title, PIL image, lines below) for each.
        heading: text above all, wrapped.
        side: width of an image in pixels; images keep their proportions and sharp token edges.

    Returns:
        An RGB PIL image.

    Raises:
        ValueError: if there are no columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not columns:
        raise ValueError("there are no images to compare: pass at least one column")
    title_font, font = ImageFont.load_default(size=20), ImageFont.load_default(size=17)
    gap, line = 24, 24
    pictures = [image.convert("RGB") for _, image, _ in columns]
    pictures = [
        picture.resize((side, max(1, round(picture.height * side / picture.width))), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    width = gap + len(columns) * (side + gap)
    heading_lines = _wrapped(heading, title_font, width - 2 * gap)
    top = gap + len(heading_lines) * 28 + (10 if heading_lines else 0)
    text_lines = max(len(lines) for _, _, lines in columns)
    height = top + 32 + max(picture.height for picture in pictures) + 12 + text_lines * line + gap
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, text in enumerate(heading_lines):
        draw.text((gap, gap + index * 28), text, font=title_font, fill="black")
    for index, ((name, _, lines), picture) in enumerate(zip(columns, pictures)):
        x, y = gap + index * (side + gap), top
        draw.text((x, y), name, font=title_font, fill=_TITLE_COLOUR)
        y += 32
        canvas.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline="#bbbbbb")
        y += picture.height + 12
        for number, text in enumerate(lines):
            draw.text((x, y + number * line), text, font=font, fill="#222222")
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
