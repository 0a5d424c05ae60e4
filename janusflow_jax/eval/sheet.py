"""A grid of images with a label under each, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

_FONT_SIZE = 13
_LETTER_WIDTH = 6.6  # of an average letter, in pixels
_GAP = 8
_LINES = 2


def image_grid(
    images: Sequence[Image.Image | np.ndarray],
    labels: Sequence[str],
    columns: int = 6,
    scale: int = 2,
) -> Image.Image:
    """Draws the grid, row by row.

    Args:
      images: PIL images or uint8[H, W, 3], all of one size.
      labels: one for each image; wrapped into two lines, and cut with an ellipsis where too long.
      columns: images in a row.
      scale: width of the square that shows a pixel; pixels are not smoothed.
    """
    images = [x if isinstance(x, Image.Image) else Image.fromarray(np.asarray(x)) for x in images]
    font = ImageFont.load_default(_FONT_SIZE)
    width, height = (side * scale for side in images[0].size)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_w, cell_h = width + _GAP, height + _LINES * (_FONT_SIZE + 3) + _GAP
    sheet = Image.new("RGB", (columns * cell_w + _GAP, rows * cell_h + _GAP), (236, 236, 236))
    pen = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = _GAP + i % columns * cell_w, _GAP + i // columns * cell_h
        big = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(big, (x, y))
        letters = max(4, int(width / _LETTER_WIDTH))
        lines = textwrap.wrap(label, letters, max_lines=_LINES, placeholder="…")
        place = (x + width / 2, y + height + 1)
        pen.multiline_text(
            place, "\n".join(lines), "black", font, anchor="ma", align="center", spacing=3
        )
    return sheet


def save(image: Image.Image, path: epath.PathLike) -> None:
    """Writes a PNG file, on a disk or in a bucket."""
    with epath.Path(path).open("wb") as file:
        image.save(file, "PNG")
