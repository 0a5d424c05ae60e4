"""Encoded bytes -> RGB -> the model's picture, for each of the two tasks.

Pictures stay uint8 until they are on the device; `to_float` is the one normalisation.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageOps

from janusflow_jax.config.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_BYTES = 64 * 2**20
MIN_SIDE = 14
"""The shortest side that a picture may shrink to for understanding, in pixels."""
GAP = 2
"""Training's pictures are decoded at least so many times as large as they are needed."""
GREY = 127
"""Fills the square around a picture for understanding."""


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes JPEG, PNG or WebP (the first frame), upright.

    Transparent pixels lie on white: that is what a page shows, and what the caption's author saw.
    Grey, palette, 16-bit and CMYK pictures become RGB.

    Args: as of `open_image`.
    Returns:
      uint8[H, W, 3].
    Raises:
      DataError: another format, too large, truncated or broken.
    """
    return np.asarray(open_image(data, max_pixels=max_pixels, max_bytes=max_bytes))


def open_image(
    data: bytes,
    short: int = 0,
    long: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """`decode` without the copy into an array.

    Args:
      data: the file's bytes.
      short, long: a JPEG whose short (long) side is twice so long or more is decoded at 1/2, 1/4 or
        1/8 of its size, at least so long: several times as fast, and when it is shrunk further the
        difference is small (benchmarks/RESULTS.md). 0: every pixel is decoded.
      max_pixels: more is refused before anything is decoded.
      max_bytes: more is refused.
    Raises:
      DataError: see `decode`.
    """
    if not data:
        raise DataError("expected a picture; got 0 bytes", "0 bytes")
    if len(data) > max_bytes:
        raise DataError(
            f"expected at most {max_bytes / 2**20:.0f} MiB; got {len(data) / 2**20:.1f} MiB: "
            "store a smaller picture",
            "too many bytes",
        )
    kind = "a picture"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"expected at most {max_pixels / 1e6:.0f} megapixels; got {width} x {height} = "
                    f"{width * height / 1e6:.0f}: shrink the picture first",
                    "too many pixels",
                )
            kind = str(image.format)
            _shrink(image, short, long)
            image.load()
            return _rgb(_upright(image))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(
            f"expected at most {max_pixels / 1e6:.0f} megapixels ({e}): shrink the picture first",
            "too many pixels",
        ) from e
    except Image.UnidentifiedImageError as e:
        raise DataError(
            f"expected {', '.join(FORMATS)}; got {len(data)} bytes that begin {data[:8]!r}",
            "not JPEG, PNG or WebP",
        ) from e
    except MemoryError:
        raise
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error
        raise DataError(
            f"{kind} of {len(data)} bytes is truncated or broken: {e}", "truncated or broken"
        ) from e


def _shrink(image: Image.Image, short: int, long: int) -> None:
    """Lets a JPEG decode at a fraction of its size; other formats have no such thing."""
    sides = min(image.size), max(image.size)
    if short or long:
        scale = max(short / sides[0], long / sides[1])
        width, height = (max(1, math.ceil(x * scale)) for x in image.size)
        image.draft(None, (width, height))


def _upright(image: Image.Image) -> Image.Image:
    """Turns the picture as its EXIF orientation asks; broken EXIF is ignored."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # it copies, turned or not
    except Exception:  # noqa: BLE001  EXIF is free-form bytes; the pixels are good
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(grey >> 8, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # that copies, too


def read(picture: Any) -> np.ndarray:
    """A path, PIL image, encoded bytes or array -> uint8[H, W, 3].

    Raises: DataError: not a picture that can be read; says why and which.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f"image array: expected uint8[H, W, 3]; got {picture.dtype}{picture.shape}"
            )
        return picture
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")  # one path for grey, palette and transparent pictures
        return decode(buffer.getvalue())
    if isinstance(picture, bytes):
        return decode(picture)
    path = epath.Path(picture)
    if not path.is_file():
        raise DataError(f"image {path}: no such file")
    try:
        return decode(path.read_bytes())
    except DataError as error:
        raise DataError(f"image {path}: {error}") from error


def for_understanding(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, size: int
) -> UInt8[np.ndarray, "H H 3"]:
    """The whole picture, long side `size`, centred on grey.

    Source: SPEC section 4 (floor, at least 14 pixels, bicubic); equals the published processor.

    Args:
      image: uint8[H, W, 3], or RGB of `open_image`.
      size: side of the result in pixels.
    Returns:
      uint8[size, size, 3].
    """
    picture = _picture(image)
    long = max(picture.size)
    new_w, new_h = (max(int(x / long * size), MIN_SIDE) for x in picture.size)
    small = picture.resize((new_w, new_h), Image.Resampling.BICUBIC)
    square = np.full((size, size, 3), GREY, np.uint8)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    square[top : top + new_h, left : left + new_w] = np.asarray(small)
    return square


def for_generation(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, size: int, key: tuple[int, ...] | None = None
) -> UInt8[np.ndarray, "H H 3"]:
    """A square of the picture, short side to `size`.

    The square is cut before it is resized, so a very long picture is never enlarged whole.

    Args:
      image: uint8[H, W, 3], or RGB of `open_image`.
      size: side of the result in pixels.
      key: of the random place of the square; None takes the centre.
    Returns:
      uint8[size, size, 3].
    """
    picture = _picture(image)
    width, height = picture.size
    side = min(height, width)
    spare_y, spare_x = height - side, width - side
    if key is None or not (spare_y or spare_x):
        top, left = spare_y // 2, spare_x // 2
    else:
        rng = np.random.default_rng(key)
        top, left = int(rng.integers(spare_y + 1)), int(rng.integers(spare_x + 1))
    if spare_y or spare_x:
        picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _picture(image: np.ndarray | Image.Image) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def to_float(images: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """uint8 -> float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    return (images.astype(np.float32) / 255 - 0.5) / 0.5
