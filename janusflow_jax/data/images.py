"""Encoded bytes -> RGB -> a square of the model's size, for each of the two tasks.

Images stay uint8 until they are on the device (`models.encode.to_float` normalizes them).
"""

from __future__ import annotations

import io
import math
import os
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_BYTES = 64 * 2**20
MIN_SIDE = 14
"""The shortest side that an image may shrink to for understanding, in pixels."""
GAP = 2
"""Training decodes JPEGs at no less than this many times the size that it needs."""
GRAY = 127
"""Fills the square around an image for understanding."""


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes JPEG, PNG or WebP (the first frame), upright.

    Transparent pixels become white, as on the page where the caption's author saw the image.
    Gray, palette, 16-bit and CMYK images become RGB.

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
      short, long: needed lengths of the sides, in pixels. A JPEG at least twice as large is decoded
        at 1/2, 1/4 or 1/8 of its size, never below these lengths. That is several times as fast,
        and the difference after resizing is small (benchmarks/RESULTS.md). 0: full size.
      max_pixels: larger images are refused before anything is decoded.
      max_bytes: larger files are refused.
    Raises:
      DataError: see `decode`.
    """
    if not data:
        raise DataError("expected an image; got 0 bytes", "0 bytes")
    if len(data) > max_bytes:
        raise DataError(
            f"expected at most {max_bytes / 2**20:.0f} MiB; got {len(data) / 2**20:.1f} MiB: "
            "store a smaller image",
            "too many bytes",
        )
    kind = "an image"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"expected at most {max_pixels / 1e6:.0f} megapixels; got {width} x {height} = "
                    f"{width * height / 1e6:.0f}: shrink the image first",
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
            f"expected at most {max_pixels / 1e6:.0f} megapixels ({e}): shrink the image first",
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
    """Makes a JPEG decode at a fraction of its size; other formats cannot."""
    sides = min(image.size), max(image.size)
    if short or long:
        scale = max(short / sides[0], long / sides[1])
        width, height = (max(1, math.ceil(x * scale)) for x in image.size)
        image.draft(None, (width, height))


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; broken EXIF is ignored."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # it copies even if upright
    except Exception:  # noqa: BLE001  EXIF is free-form bytes; the pixels are good
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # in memory only: no file that we read has these modes
        low, high = np.asarray(image.getextrema(), np.float64)
        if not 0 <= low <= high <= 255 or 0 < high <= 1:
            raise DataError(
                f"image of mode {image.mode}: expected values from 0 to 255; got {low} to {high}: "
                "scale them and convert the image to mode L"
            )
    if image.mode == "La":  # PIL converts it to nothing else
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def read(image: Any) -> np.ndarray:
    """A path, encoded bytes, an open file, a PIL image or an array -> uint8[H, W, 3].

    However an image comes, its pixels are those of its file.

    Args:
      image: a path; bytes, bytearray or memoryview; a binary file, which is read from its start; a
        PIL image of any mode; or uint8[H, W, 3].
    Raises:
      DataError: not an image that can be read; the message names the path.
      ConfigError: a URL that is no bucket's, or a bucket that cannot be opened.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                f"image array: expected uint8[H, W, 3]; got {image.dtype}{list(image.shape)}"
            )
        return image
    if isinstance(image, Image.Image):
        try:
            pixels = np.asarray(_rgb(_upright(image)))
        except (OSError, SyntaxError) as error:  # a file that PIL opened and has not decoded yet
            raise DataError(f"image: truncated or broken: {error}") from error
        return read(pixels)  # which refuses an image without a pixel
    if hasattr(image, "read"):
        if image.seekable():  # its position is behind the image if PIL has just saved it
            image.seek(0)
        image = image.read()
        if isinstance(image, str):
            raise DataError("image: expected a file opened in mode 'rb'; got one opened for text")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(bytes(image))
    if not isinstance(image, (str, os.PathLike)):
        raise DataError(
            "image: expected a path, bytes, a binary file, a PIL image or uint8[H, W, 3]; got "
            f"{type(image).__name__}"
        )
    if str(image).startswith("data:"):
        raise DataError("image: expected a path or bytes; got a data: URL: decode its base64 text")
    path = files.resolve(image)
    if not path.is_file():
        raise DataError(f"image {image}: no such file")
    try:
        return decode(path.read_bytes())
    except DataError as error:
        raise DataError(f"image {image}: {error}") from error


def for_understanding(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, size: int
) -> UInt8[np.ndarray, "H H 3"]:
    """The whole image, resized to a long side of `size`, in the middle of a gray square.

    NOTE(parity): sides are rounded down and at least MIN_SIDE long, and the filter is bicubic, as
    in the published code's VLMImageProcessor.

    Args:
      image: uint8[H, W, 3], or RGB of `open_image`.
      size: side of the result in pixels.
    Returns:
      uint8[size, size, 3].
    """
    image = _pil(image)
    long = max(image.size)
    new_w, new_h = (max(int(x / long * size), MIN_SIDE) for x in image.size)
    small = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    square = np.full((size, size, 3), GRAY, np.uint8)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    square[top : top + new_h, left : left + new_w] = np.asarray(small)
    return square


def for_generation(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, size: int, key: tuple[int, ...] | None = None
) -> UInt8[np.ndarray, "H H 3"]:
    """A square crop of the image, resized to `size`.

    It is cropped before it is resized, so that a very long image is never enlarged whole.

    Args:
      image: uint8[H, W, 3], or RGB of `open_image`.
      size: side of the result in pixels.
      key: of the random place of the crop; None takes the center.
    Returns:
      uint8[size, size, 3].
    """
    image = _pil(image)
    width, height = image.size
    side = min(height, width)
    spare_y, spare_x = height - side, width - side
    if key is None or not (spare_y or spare_x):
        top, left = spare_y // 2, spare_x // 2
    else:
        draw = np.random.default_rng(key)
        top, left = int(draw.integers(spare_y + 1)), int(draw.integers(spare_x + 1))
    if spare_y or spare_x:
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _pil(image: np.ndarray | Image.Image) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image
