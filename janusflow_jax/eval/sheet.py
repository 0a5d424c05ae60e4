"""A grid of images with a label under each, as one image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from janusflow_jax.config.errors import JanusFlowError

FONT_SIZE = 13
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
    Raises:
      JanusFlowError: no image, another number of labels, or images of several sizes.
    """
    images = [x if isinstance(x, Image.Image) else Image.fromarray(np.asarray(x)) for x in images]
    sizes = {x.size for x in images}
    if len(sizes) != 1 or len(labels) != len(images):
        raise JanusFlowError(
            "image grid: expected images of one size and a label for each; got "
            f"{len(images)} images of sizes {sorted(sizes)} and {len(labels)} labels"
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
    """The label's words in at most two lines that fit."""
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
