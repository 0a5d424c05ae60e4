"""Images for tests of data formats, drawn with PIL: one scene, in every kind of file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw

SIZE = (96, 64)
RED, BLUE = (200, 30, 40), (30, 60, 200)


def scene(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red on the left, blue on the right, a white disc and some grain: a picture with an up."""
    width, height = size
    picture = Image.new("RGB", size, RED)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((width // 2, 0, width, height), fill=BLUE)
    pen.ellipse((width // 8, height // 8, width // 4, height // 3), fill="white")
    grain = np.random.default_rng(0).integers(-6, 7, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def encoded(form: str = "JPEG", picture: Image.Image | None = None, **options: object) -> bytes:
    """The scene (or another picture) as a file's bytes."""
    out = io.BytesIO()
    quality = {"quality": 95} if form in ("JPEG", "WEBP") else {}
    (scene() if picture is None else picture).save(out, form, **(quality | options))
    return out.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG whose EXIF says how to hold it: upright, it is the scene."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    return encoded("JPEG", scene().transpose(back), exif=exif)


def bomb(width: int, height: int) -> bytes:
    """A valid one-bit PNG of so many pixels, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    row = b"\0" + bytes(-(-width // 8))
    pixels = zlib.compressobj(9)
    data = b"".join(pixels.compress(row) for _ in range(height)) + pixels.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def broken_crc() -> bytes:
    """A PNG with a bit of its pixels turned."""
    data = bytearray(encoded("PNG"))
    data[data.index(b"IDAT") + 200] ^= 0xFF
    return bytes(data)


def animated(form: str) -> bytes:
    """Two frames: the scene, then black."""
    black = Image.new("RGB", SIZE)
    options = {"lossless": True} if form == "WEBP" else {}
    return encoded(form, save_all=True, append_images=[black], duration=100, **options)


def looks_right(pixels: np.ndarray, grey: bool = False) -> bool:
    """Whether decoded pixels show the scene, upright and in its colors."""
    height, width = pixels.shape[:2]
    left = pixels[height // 2 :, width // 8 : width // 3].reshape(-1, 3).mean(0)
    right = pixels[height // 2 :, 2 * width // 3 : -width // 8].reshape(-1, 3).mean(0)
    want = (RED, BLUE)
    if grey:
        want = [[np.dot(c, (0.299, 0.587, 0.114))] * 3 for c in want]
    wide = abs(width / height - SIZE[0] / SIZE[1]) < 0.05
    return wide and all(
        np.abs(got - w).max() < 14 for got, w in zip((left, right), want, strict=True)
    )
