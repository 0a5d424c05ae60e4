"""Encoded bytes -> RGB -> a square of the model's size, for each of the two tasks.

Images stay uint8 until they are on the device (`models.encode.to_float` normalizes them).
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import ExifTags, Image, ImageCms

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.config.files import LFS_HELP, LFS_POINTER

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_BYTES = 64 * 2**20
MIN_SIDE = 14
"""The shortest side that an image may shrink to for understanding, in pixels."""
GAP = 2
"""Training decodes JPEGs at no less than this many times the size that it needs."""
GRAY = 127
"""Fills the square around an image for understanding."""
SRGB_TOLERANCE = 2
"""A color profile that moves no color by more than this (of 255) counts as sRGB."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_OTHER_FORMATS = (  # offset, bytes there, name
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "HEIC"),
    (0, b"<svg", "SVG"),
)
_TRANSPOSES = {  # of EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# `open_image` handles what PIL warns of: large images, and metadata that it cannot read.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes JPEG, PNG or WebP (the first frame), upright.

    Transparent pixels become white, as on the page where the caption's author saw the image.
    Gray, palette, 16-bit and CMYK images become RGB, and a color profile becomes sRGB.

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
    problem: Exception | None = None
    for attempt in _without_metadata(data):
        try:
            with Image.open(io.BytesIO(attempt), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"expected at most {max_pixels / 1e6:.0f} megapixels; got {width} x "
                        f"{height} = {width * height / 1e6:.0f}: shrink the image first",
                        "too many pixels",
                    )
                _shrink(image, short, long)
                image.load()
                return _rgb(_upright(image))
        except (DataError, MemoryError):
            raise
        except Image.DecompressionBombError as e:
            raise DataError(
                f"expected at most {max_pixels / 1e6:.0f} megapixels ({e}): shrink the image first",
                "too many pixels",
            ) from e
        except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, struct.error
            problem = problem or e
    if data.startswith(LFS_POINTER):
        raise DataError(f"expected an image; {LFS_HELP}", "Git LFS pointer") from problem
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if data.startswith((_JPEG, _PNG)) or is_webp:
        raise DataError(
            f"{len(data)} bytes of an image are truncated or broken: {problem}",
            "truncated or broken",
        ) from problem
    raise DataError(
        f"expected {', '.join(FORMATS)}; got {_describe(data)}", "not JPEG, PNG or WebP"
    ) from problem


def _describe(data: bytes) -> str:
    """The name of another image format, or the first bytes."""
    for offset, start, name in _OTHER_FORMATS:
        if data.startswith(start, offset):
            return f"{name}: convert it (ImageMagick: `mogrify -format png FILES`)"
    return f"{len(data)} bytes that begin {data[:8]!r}"


def _without_metadata(data: bytes) -> Iterator[bytes]:
    """The file, then copies with less and less metadata; the orientation (EXIF) always stays.

    PIL refuses some files because of their metadata, although the pixels are good.
    """
    yield data
    if data.startswith(_PNG):
        keeps = [(b"eXIf", b"tRNS", b"iCCP"), (b"eXIf", b"tRNS"), (b"eXIf",)]
        select = _png_chunks
    elif data.startswith(_JPEG):
        keeps = [(0xE1, 0xEE, 0xE2), (0xE1, 0xEE), (0xE1,)]  # EXIF, Adobe's colors, profile
        select = _jpeg_segments
    else:
        return
    for keep in keeps:
        bare = select(data, keep)
        if bare != data:
            yield bare
        data = bare


def _png_chunks(data: bytes, keep: tuple) -> bytes:
    """The critical chunks (with capital letters), and intact chunks named in `keep`."""
    out, begin = [data[:8]], 8
    while begin < len(data):
        name = data[begin + 4 : begin + 8]
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        checksum = zlib.crc32(data[begin + 4 : end - 4]).to_bytes(4, "big")
        if name[:1].isupper() or (name in keep and data[end - 4 : end] == checksum):
            out.append(data[begin:end])
        begin = end
    return b"".join(out)


def _jpeg_segments(data: bytes, keep: tuple) -> bytes:
    """The file without application segments (APP0 to APP15) other than those in `keep`."""
    out, begin = [data[:2]], 2
    while data[begin : begin + 1] == b"\xff" and data[begin + 1 : begin + 2] != b"\xda":
        marker = data[begin + 1]
        end = begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
        if marker in keep or not 0xE0 <= marker <= 0xEF:
            out.append(data[begin:end])
        begin = end
    return b"".join([*out, data[begin:]])


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
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  EXIF is free-form bytes; the pixels are good
        orientation = None
    # not ImageOps.exif_transpose, which also writes the EXIF again and fails if that is broken
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def _rgb(image: Image.Image) -> Image.Image:
    """RGB in sRGB, on white.

    NOTE(parity): the published processor is PIL's `convert("RGB")`, which ignores color profiles
    and transparency. Here both count, in training and inference, as a viewer shows the image. An
    image without a profile, or with one of sRGB, keeps its values.
    """
    profile = image.info.get("icc_profile")
    is_gray = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
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
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if profile:
        mode = "L" if is_gray else "CMYK" if image.mode == "CMYK" else "RGB"
        if transform := _to_srgb(profile, mode):
            return cast(Image.Image, ImageCms.applyTransform(image.convert(mode), transform))
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """The transform of a color profile to sRGB.

    None if the profile is broken, belongs to another mode, or changes nothing visible.
    """
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), -1).reshape(1, -1, 3)
    colors = Image.fromarray(grid.astype(np.uint8)).convert(mode)
    shown = cast(Image.Image, ImageCms.applyTransform(colors, transform))
    change = np.asarray(shown).astype(int) - np.asarray(colors.convert("RGB"))
    return transform if np.abs(change).max() > SRGB_TOLERANCE else None


def data_url_bytes(url: str) -> bytes:
    """The bytes of `data:image/...;base64,...`.

    Raises:
      DataError: not such a URL, or broken base64.
    """
    head, comma, text = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise DataError(
            f"image: expected data:image/...;base64,...; got {url[:40]!r}", "not a data: URL"
        )
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii's, and that of characters beyond ASCII
        raise DataError(f"image: expected base64 after 'base64,': {error}", "base64") from error


def read(image: Any) -> np.ndarray:
    """A path, encoded bytes, an open file, a PIL image or an array -> uint8[H, W, 3].

    Every form of an image gives the same pixels as its file.

    Args:
      image: a path; a `data:` URL; bytes, bytearray or memoryview; a binary file, which is read
        from its start; a PIL image of any mode; or uint8[H, W, 3].
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
        except (OSError, SyntaxError, ValueError) as error:  # PIL decodes a file only here
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
    if isinstance(image, str) and image.startswith("data:"):
        return decode(data_url_bytes(image))
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


def read_mask(mask: Any, shape: tuple[int, int], size: int) -> Bool[np.ndarray, "H H"]:
    """Which pixels of an image of `for_generation` are generated again.

    Args:
      mask: as of `read`, or bool[H, W]; white, transparent and True pixels are generated again.
      shape: height and width of the image that the mask belongs to.
      size: side of the result in pixels.
    Raises:
      DataError: not a mask that can be read, of another size than its image, or without a pixel to
        generate.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2:
        mask = np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255
    pixels = read(mask)
    if pixels.shape[:2] != tuple(shape):
        raise DataError(
            f"mask: expected {shape[1]} x {shape[0]} pixels, as its image; got "
            f"{pixels.shape[1]} x {pixels.shape[0]}: resize one of them"
        )
    marked = for_generation(pixels, size).mean(-1) > 127
    if not marked.any():
        raise DataError(
            "mask: expected white pixels where the image is generated again; got none in its "
            "central square"
        )
    return marked


def mask_cells(mask: Bool[np.ndarray, "H H"], side: int) -> Bool[np.ndarray, "h h"]:
    """The cells of a side x side grid that hold a marked pixel, and their neighbors: at a border
    a cell of the VAE depends on both sides."""
    factor = len(mask) // side
    cells = mask.reshape(side, factor, side, factor).any((1, 3))
    padded = np.pad(cells, 1)
    shifts = [padded[i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return np.any(shifts, axis=0)


def _pil(image: np.ndarray | Image.Image) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image
