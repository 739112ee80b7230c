# SPDX-License-Identifier: Apache-2.0
"""A grid of pictures: captions down, methods and budgets across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.plots import COLOURS

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE, _GAP, _FRAME = 128, 14, 4
_RIGHT, _WRONG = COLOURS[2], COLOURS[1]


def picture_grid(model: Any, captions: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Image:
    """Draw the pictured captions of every run, the full cache first.

    A frame says whether everything the caption asks for is right (green) or not (orange).

    Args:
        model: decodes the tokens.
        captions: texts; as many rows as every run has pictured tokens.
        runs: the runs' files.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = len(runs[0]["pictured_tokens"])
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=14)
    left = 2 * _GAP + 190
    top, pitch = 54, _SIDE + _GAP
    legend = ("The first captions, not picked.", "Frame: green, everything right; orange, something wrong.")
    width = max(left + len(runs) * pitch, round(max(map(small.getlength, legend))) + 2 * _GAP)
    canvas = Image.new("RGB", (width, top + rows * pitch + 22 * len(legend) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(captions[:rows]):
        lines = text.replace(" on ", ",on ").split(",")
        for number, line in enumerate(lines):
            draw.text((_GAP, top + row * pitch + 8 + number * 20), line.strip(), font=small, fill="black")
    for column, run in enumerate(runs):
        x = left + column * pitch
        name = "full cache" if run["method"] == FULL else f"{run['method']}\n{budget_label(run['budget'])}"
        draw.multiline_text((x, 8), name, font=font, fill="black")
        pixels = model.decode_image_tokens(torch.tensor(run["pictured_tokens"]).to(model.device)).cpu().numpy()
        for row in range(rows):
            y = top + row * pitch
            colour = _RIGHT if run["outcomes"]["all_right"][row] else _WRONG
            draw.rectangle((x - _FRAME, y - _FRAME, x + _SIDE + _FRAME - 1, y + _SIDE + _FRAME - 1), fill=colour)
            picture = Image.fromarray(pixels[row]).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
    for number, text in enumerate(legend):
        draw.text((_GAP, top + rows * pitch + 22 * number), text, font=small, fill="#444444")
    return canvas
