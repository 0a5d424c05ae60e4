"""A grid of pictures with their prompts under them, as one PNG to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from janusflow_jax.config.errors import JanusFlowError

FONT_SIZE = 13
_GAP = 8
_LINES = 2


def make_sheet(
    pictures: Sequence[Image.Image | np.ndarray],
    labels: Sequence[str],
    columns: int = 6,
    scale: int = 2,
) -> Image.Image:
    """Draws the grid, row by row.

    Args:
      pictures: PIL images or uint8[H, W, 3]; all of one size.
      labels: one a picture; broken into two lines, cut with an ellipsis where too long.
      columns: pictures a row (fewer where there are fewer pictures).
      scale: every pixel becomes a square of this many, unsmoothed: as painted.
    Raises:
      JanusFlowError: no picture, another number of labels, or pictures of several sizes.
    """
    images = [x if isinstance(x, Image.Image) else Image.fromarray(np.asarray(x)) for x in pictures]
    sizes = {x.size for x in images}
    if len(sizes) != 1 or len(labels) != len(images):
        raise JanusFlowError(
            "sheet: expected at least one picture, all of one size, and one label each; got "
            f"{len(images)} pictures of sizes {sorted(sizes)} and {len(labels)} labels"
        )
    font = ImageFont.load_default(FONT_SIZE)
    line_height = FONT_SIZE + 3
    width, height = (side * scale for side in images[0].size)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_w, cell_h = width + _GAP, height + _LINES * line_height + _GAP
    sheet = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), (236, 236, 236))
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = _GAP + i % columns * cell_w, _GAP + i // columns * cell_h
        big = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(big, (x, y))
        for n, line in enumerate(_wrap(label, font, width)):
            left = x + (width - font.getlength(line)) / 2
            pen.text((left, y + height + 1 + n * line_height), line, fill="black", font=font)
    return sheet


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The label in at most two lines that fit, by words."""
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = len(lines) > _LINES
    lines = lines[:_LINES]
    for n, line in enumerate(lines):
        ellipsis = cut and n == _LINES - 1
        while len(line) > 1 and font.getlength(line + "…" * ellipsis) > width:
            line, ellipsis = line[:-1], True
        lines[n] = line + "…" * ellipsis
    return lines
