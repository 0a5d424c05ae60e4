"""Pictures: found, read, decoded once in full, and kept as they are or shrunk."""

from __future__ import annotations

import io
import re
from typing import Any

from etils import epath
from PIL import Image

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import images
from janusflow_jax.data.prepare import inputs
from janusflow_jax.data.prepare.raw import Options, Skipped

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp")
REFUSED = (
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".jxl",
    ".svg",
    ".ico",
    ".psd",
    ".ppm",
)
"""Pictures by their names that are not decoded: each is counted, none is passed over."""

_JPEG_QUALITY = 95
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def inside(folder: str, name: Any) -> epath.Path:
    """The path of a picture that a row names.

    Raises:
      Skipped: no path, a web address, or one that leads out of the folder.
    """
    if not isinstance(name, str):
        raise Skipped("picture: neither path nor bytes", f"{type(name).__name__} {str(name)[:40]}")
    if not name.strip():
        raise Skipped("picture: missing", "no name")
    if "\x00" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise Skipped("picture: missing", f"no file can be named {name[:80]!r}")
    if _SCHEME.match(name):
        raise Skipped("picture: a web address, not a file", name[:120])
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\", "~")) or ".." in parts:
        raise Skipped("picture: outside its folder", name[:120])
    return epath.Path(folder) / name


def load(picture: Any, options: Options) -> bytes:
    """A picture's bytes, decoded once in full; shrunk where it is longer than options.max_side.

    Args:
      picture: bytes or a path.
    Raises:
      Skipped: missing, no picture we accept, too large, too small, too long.
      DataError: the store fails again and again.
    """
    data = picture
    if not isinstance(data, bytes):
        data = inputs.read_bytes(picture, "picture", options.max_bytes)
    try:
        pixels = images.decode(data, options.max_pixels, options.max_bytes)
    except DataError as e:
        raise Skipped(f"picture: {e.reason}", str(e)) from e
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    if short < options.min_side:
        raise Skipped("picture: too small", f"{width} x {height}, at least {options.min_side}")
    if long > short * options.max_aspect:
        raise Skipped("picture: too long and thin", f"{width} x {height}")
    if options.max_side and long > options.max_side:
        return _shrunk(data, Image.fromarray(pixels), options.max_side)
    return data


def _shrunk(data: bytes, picture: Image.Image, max_side: int) -> bytes:
    """PNG stays PNG (drawings, text); the others become JPEG without colour subsampling."""
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    out = io.BytesIO()
    if data.startswith(b"\x89PNG"):
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()
