"""Decoding of every odd kind of image, and parity of the preparation."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms
from safetensors import numpy as safetensors

from janusflow_jax.config.errors import ConfigError, DataError
from janusflow_jax.data import images
from janusflow_jax.models import encode as encode_lib

GOLDEN = Path(__file__).parent / "data" / "golden" / "tiny"


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_understanding_equals_the_published_processor():
    want = safetensors.load_file(GOLDEN / "expected.safetensors")["preprocess.pixel_values"]
    for i in range(4):
        image = images.decode((GOLDEN / "images" / f"{i}.png").read_bytes())
        got = encode_lib.to_float(jnp.asarray(images.for_understanding(image, 64)), jnp.float32)
        np.testing.assert_allclose(got, want[i].transpose(1, 2, 0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_come_back(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    got = images.decode(encode(Image.fromarray(noise()), kind, **options))
    np.testing.assert_array_equal(got, noise())


@pytest.mark.parametrize(
    "mode",
    [
        *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"),
        *("LAB", "F", "I;16", "I;16B"),
    ],
)
def test_an_open_image_of_every_mode_becomes_rgb(mode):
    colors = {"CMYK": 0, "YCbCr": (255, 128, 128), "HSV": (0, 0, 255), "LAB": (255, 128, 128)}
    white = colors.get(mode, 65535 if mode.startswith("I") else "white")
    image = Image.new("LA" if mode == "PA" else mode, (8, 6), white)
    got = images.read(image.convert("PA") if mode == "PA" else image)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8 and got.min() >= 253


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    flat = Image.new("RGB", (8, 6), (255, 255, 255))
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), 65535, np.uint16))
    else:
        image = flat.convert(mode)
    got = images.decode(encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8 and got.min() >= 254


def test_16_bit_grey_keeps_its_middle():
    image = Image.fromarray(np.full((6, 8), 0x8000, np.uint16))
    assert set(images.decode(encode(image)).ravel()) == {128}


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_is_white(mode):
    if mode == "RGBA":
        data = encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    else:
        image = Image.new("P", (4, 4), 0)
        image.putpalette([255, 0, 0] * 256)
        data = encode(image, transparency=0)
    assert images.decode(data).min() == 255


def test_exif_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    got = images.decode(encode(Image.fromarray(noise()), exif=exif))
    np.testing.assert_array_equal(got, np.rot90(noise(), -1))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_swapped = SRGB.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
"""A color profile whose red is sRGB's green, and its green sRGB's red."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "want"),
    [
        (None, (60, 200, 40)),
        (SRGB, (60, 200, 40)),
        (_swapped, (200, 60, 40)),
        (_swapped[:200], (60, 200, 40)),
        (b"no profile", (60, 200, 40)),
    ],
)
def test_a_color_profile_becomes_srgb(kind, profile, want):
    flat = Image.new("RGB", (16, 16), (60, 200, 40))
    options: dict = {"PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}}[kind]
    data = encode(flat, kind, **options, **({"icc_profile": profile} if profile else {}))
    got = images.decode(data)
    assert np.abs(got.astype(int) - want).max() <= 2
    np.testing.assert_array_equal(images.read(Image.open(io.BytesIO(data))), got)
    if profile == SRGB:  # bit for bit as without one
        np.testing.assert_array_equal(got, images.decode(encode(flat, kind, **options)))


@pytest.mark.parametrize(
    ("mode", "want"),
    [("RGBA", (255, 255, 255)), ("P", (200, 60, 40)), ("L", (60, 60, 60)), ("LA", (60, 60, 60))],
)
def test_a_color_profile_in_other_modes(mode, want):
    """Transparent is white in any profile; a profile of RGB means nothing in a gray image."""
    color = {"RGBA": (60, 200, 40, 0), "L": 60, "LA": (60, 255)}.get(mode)
    image = Image.new(mode, (8, 8), color) if color else Image.new("RGB", (8, 8), (60, 200, 40))
    image = image if color else image.quantize(2)
    got = images.decode(encode(image, icc_profile=_swapped))
    assert np.abs(got.astype(int) - want).max() <= 2


def _chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "metadata",
    [
        _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),
        _chunk(b"zTXt", b"a\0\5b"),
        _chunk(b"tEXt", b"a\0b", crc=5),
        _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21))),
        _chunk(b"iCCP", b"a\0\5" + zlib.compress(b"x")),
        _chunk(b"iCCP", b""),
        *[_chunk(kind, b"") for kind in (b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tRNS", b"acTL")],
        _chunk(b"eXIf", b"none"),
        _segment(0xE0, b"JFIF"),
        _segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
        _segment(0xE2, b"ICC_PROFILE\0"),
        _segment(0xE2, b"ICC_PROFILE\0\1\1x"),
        _segment(0xE2, b"MPF\0x"),
        _segment(0xED, b"Photoshop 3.0\08BIM"),
        _segment(0xEE, b"Adobe\0"),
    ],
)
def test_broken_metadata_does_not_spoil_an_image(metadata):
    """Its pixels, and an orientation beside it, are used."""
    exif = Image.Exif()
    exif[0x0112] = 6
    is_png = metadata[0] != 0xFF
    kind, begin = ("PNG", 33) if is_png else ("JPEG", 2)
    image = Image.fromarray(noise())
    good = encode(image, kind, exif=exif)
    spoils_exif = b"eXIf" in metadata or b"Exif" in metadata
    want = images.decode(encode(image, kind) if spoils_exif else good)
    got = images.decode(good[:begin] + metadata + good[begin:])
    if not spoils_exif:
        np.testing.assert_array_equal(got, want)
    assert sorted(got.shape) == sorted(want.shape)


def test_exif_that_cannot_be_written_again_still_turns_the_image():
    """The camera's name is a number; PIL's exif_transpose fails when it writes the EXIF."""
    make, orientation = (
        struct.pack(">HHIf", 0x010F, 11, 1, 1),
        struct.pack(">HHIHH", 274, 3, 1, 6, 0),
    )
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + make + orientation + bytes(4)
    got = images.decode(encode(Image.fromarray(noise()), exif=exif))
    np.testing.assert_array_equal(got, np.rot90(noise(), -1))


def turned(mode: str, kind: str) -> bytes:
    """A file whose EXIF orientation turns it by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(noise())
    if mode == "I;16":
        image = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    return encode(image, kind, exif=exif, **options)


FILES = [
    ("RGB", "JPEG"),
    ("RGB", "WEBP"),
    ("RGB", "PNG"),
    ("L", "JPEG"),
    ("CMYK", "JPEG"),
    ("YCbCr", "JPEG"),
    ("1", "PNG"),
    ("P", "PNG"),
    ("LA", "PNG"),
    ("RGBA", "PNG"),
    ("I;16", "PNG"),
]


@pytest.mark.parametrize(("mode", "kind"), FILES)
def test_an_image_in_memory_is_read_as_its_file(mode, kind, tmp_path):
    data = turned(mode, kind)
    (tmp_path / "x").write_bytes(data)
    want = images.read(tmp_path / "x")
    assert want.shape == (30, 20, 3)
    saved = io.BytesIO()
    saved.write(data)  # its position is at the end, as after PIL's `save`
    with (tmp_path / "x").open("rb") as file:
        for way in (
            str(tmp_path / "x"),
            data,
            bytearray(data),
            memoryview(data),
            saved,
            file,
            file,  # again, as in the next turn of a conversation
            Image.open(io.BytesIO(data)),
            Image.open(io.BytesIO(data)).copy(),
            want,
        ):
            np.testing.assert_array_equal(images.read(way), want, err_msg=str(type(way)))


@pytest.mark.parametrize("mode", ["RGBa", "RGBX", "HSV", "LAB", "YCbCr", "La", "F", "I"])
def test_modes_that_only_memory_has_become_rgb(mode):
    color = (200, 60, 40)
    image = Image.new("RGB", (4, 3), color)
    gray = image.convert("L").getpixel((0, 0))
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(*map(ImageCms.createProfile, ("sRGB", "LAB")), "RGB", mode)
        image = ImageCms.applyTransform(image, to_lab)
    else:
        image = image.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, mode)).convert(mode)
    want = (gray,) * 3 if mode in ("La", "F", "I") else color
    assert np.abs(images.read(image).astype(int) - want).max() <= 2


def test_a_data_url_is_read_as_its_bytes():
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (200, 10, 30)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert images.data_url_bytes(url) == file.getvalue()
    assert images.read(url)[0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize(
    "what",
    [
        "https://example.org/cat.jpg",
        "ftp://example.org/cat.jpg",
        "data:image/png;base64,iVBORw0KGgo=",
        "data:image/png;base64,\u00e9",
        "data:image/png,iVBORw0KGgo=",
        "data:text/html;base64,iVBORw0KGgo=",
        "no.png",
        "",
        None,
        3,
        [1, 2],
        b"",
        io.BytesIO(),
        io.StringIO("text"),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 4)),
        Image.fromarray(np.full((3, 4), 0.5, np.float32)),
        Image.fromarray(np.full((3, 4), np.nan, np.float32)),
        Image.fromarray(np.full((3, 4), 65535, np.int32)),
        Image.open(io.BytesIO(turned("RGB", "PNG")[:-900])),
    ],
)
def test_what_is_no_image_is_one_error(what):
    with pytest.raises((DataError, ConfigError)):
        images.read(what)


def test_truncated_broken_and_foreign_bytes():
    good = encode(Image.fromarray(noise()), "JPEG")
    with pytest.raises(DataError, match="truncated or broken"):
        images.decode(good[: len(good) // 2])
    png = encode(Image.fromarray(noise()))
    with pytest.raises(DataError, match="truncated or broken"):
        images.decode(png[: len(png) // 2])
    for kind in ("BMP", "GIF", "TIFF"):
        with pytest.raises(DataError, match=f"JPEG, PNG, WEBP; got {kind}"):
            images.decode(encode(Image.fromarray(noise()), kind))
    with pytest.raises(DataError, match="git lfs pull"):
        images.decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match="0 bytes"):
        images.decode(b"")
    with pytest.raises(DataError, match="MiB"):
        images.decode(png, max_bytes=100)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_200_megapixels_are_refused_before_decoding():
    for side in (10_001, 20_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"")
        with pytest.raises(DataError, match="megapixels"):
            images.decode(data)


def test_generation_crops_are_squares_of_the_image():
    image = noise(64, 200)
    centre = images.for_generation(image, 64)
    np.testing.assert_array_equal(centre, image[:, 68:132])
    crops = [images.for_generation(image, 64, (0, k)) for k in range(8)]
    assert len({c.tobytes() for c in crops}) > 4
    np.testing.assert_array_equal(crops[3], images.for_generation(image, 64, (0, 3)))
    assert images.for_generation(image, 32, (1,)).shape == (32, 32, 3)


def test_sides_are_floored_and_never_too_short():
    wide = images.for_understanding(np.zeros((37, 100, 3), np.uint8), 64)
    rows = np.flatnonzero((wide != images.GRAY).any((1, 2)))
    assert len(rows) == 23 and rows[0] == 20  # 64 * 37 / 100 = 23.7
    thin = images.for_understanding(np.zeros((100, 3, 3), np.uint8), 64)
    assert (thin != images.GRAY).any((0, 2)).sum() == 14


def test_extreme_shapes():
    for shape in ((1, 5000), (5000, 1)):
        assert images.for_understanding(noise(*shape), 64).shape == (64, 64, 3)
        assert images.for_generation(noise(*shape), 64, (0,)).shape == (64, 64, 3)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    """At half, a quarter or an eighth, never below what was asked for; upright and whole."""
    y, x = np.mgrid[:640, :960]
    waves = np.stack([np.sin(x / 90) + np.cos(y / 70), np.sin(y / 50), np.cos((x + y) / 110)], -1)
    smooth = Image.fromarray(np.uint8(waves / waves.max() * 100 + 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth, "JPEG", quality=95)
    turned = encode(smooth, "JPEG", quality=95, exif=exif)
    for short, long, size in (
        (0, 0, 960),
        (160, 0, 240),
        (161, 0, 480),
        (0, 240, 240),
        (0, 9, 120),
    ):
        assert images.open_image(data, short, long).size == (size, size * 2 // 3)
        assert images.open_image(turned, short, long).size == (size * 2 // 3, size)
    assert images.open_image(encode(smooth), 64, 64).size == (960, 640)  # PNG has no such thing
    whole = images.decode(data)
    for near, exact in (
        (images.for_generation(images.open_image(data, short=128), 64), 0),
        (images.for_understanding(images.open_image(data, long=128), 64), 1),
    ):
        prepare = images.for_understanding if exact else images.for_generation
        error = near.astype(int) - prepare(whole, 64)
        assert near.shape == (64, 64, 3) and np.abs(error).mean() < 2
    with pytest.raises(DataError, match="truncated or broken"):
        images.open_image(data[: len(data) // 2], short=64)
