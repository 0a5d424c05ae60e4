"""Bad and odd input for `prepare_data.py folder`: pairs of files, JSON lines, CSV.

A case is (name, how to make it, what must come out): a reason, or GOOD, or several of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from helpers import scenes

GOOD = "good"
GREY = "good, grey"
JPG, PNG = scenes.encoded(), scenes.encoded("PNG")
MAX_BYTES, MAX_CHARS = 2**20, 2000


def files(jpg: bytes | None = JPG, txt: bytes | None = b"a red wall", suffix: str = ".jpg"):
    """A picture and its caption; None leaves one out."""

    def make(folder: Path, name: str) -> None:
        if jpg is not None:
            (folder / f"{name}{suffix}").write_bytes(jpg)
        if txt is not None:
            (folder / f"{name}.txt").write_bytes(txt)

    return make


def _link(target: str):
    def make(folder: Path, name: str) -> None:
        os.symlink(target.format(name=name), folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("a link")

    return make


def _two_of_a_name(folder: Path, name: str) -> None:
    files()(folder, name)
    (folder / f"{name}.png").write_bytes(PNG)


def _loop(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    os.symlink("..", folder / name / "up")
    files()(folder / name, name)


def _mode(mode: str) -> Image.Image:
    return scenes.scene().convert(mode)


def _clear(mode: str = "RGBA") -> Image.Image:
    """The scene; its disc is transparent, and black below."""
    picture = scenes.scene().convert("RGBA")
    pixels = np.array(picture)
    disc = (pixels[..., :3] > 220).all(-1)
    pixels[disc] = 0
    return Image.fromarray(pixels).convert(mode)


_GREY16 = Image.fromarray((np.asarray(_mode("L")).astype(np.uint16) << 8) + 7)
_TEXT = b"no picture at all, only a text of some length"

PAIRS = [
    ("plain", files(), GOOD),
    ("jpg_truncated", files(JPG[: len(JPG) // 2]), "image: truncated or broken"),
    ("jpg_header_only", files(JPG[:24]), "image: truncated or broken"),
    ("jpg_two_bytes", files(JPG[:2]), "image: not JPEG, PNG or WebP"),
    ("jpg_zero_bytes", files(b""), "image: 0 bytes"),
    ("png_truncated", files(PNG[:-400], suffix=".png"), "image: truncated or broken"),
    (
        "png_broken_crc",
        files(scenes.broken_crc(), suffix=".png"),
        "image: truncated or broken",
    ),
    (
        "webp_truncated",
        files(scenes.encoded("WEBP")[:500], suffix=".webp"),
        "image: truncated or broken",
    ),
    ("bomb", files(scenes.bomb(20_000, 10_000), suffix=".png"), "image: too many pixels"),
    ("too_many_bytes", files(JPG + bytes(MAX_BYTES)), "image: too many bytes"),
    ("text_named_jpg", files(_TEXT), "image: not JPEG, PNG or WebP"),
    (
        "html_named_png",
        files(b"<!DOCTYPE html><p>404", suffix=".png"),
        "image: not JPEG, PNG or WebP",
    ),
    ("gif_named_jpg", files(scenes.encoded("GIF")), "image: not JPEG, PNG or WebP"),
    ("gif", files(scenes.encoded("GIF"), suffix=".gif"), "image: not JPEG, PNG or WebP"),
    ("bmp", files(scenes.encoded("BMP"), suffix=".bmp"), "image: not JPEG, PNG or WebP"),
    ("tiff", files(scenes.encoded("TIFF"), suffix=".tiff"), "image: not JPEG, PNG or WebP"),
    (
        "svg",
        files(b"<svg xmlns='http://www.w3.org/2000/svg'/>", suffix=".svg"),
        "image: not JPEG, PNG or WebP",
    ),
    (
        "thin_1x10000",
        files(scenes.encoded("PNG", Image.new("RGB", (1, 10_000))), suffix=".png"),
        "image: too small",
    ),
    (
        "thin_20x10000",
        files(scenes.encoded("PNG", Image.new("RGB", (20, 10_000))), suffix=".png"),
        "image: too long and thin",
    ),
    (
        "tracking_pixel",
        files(scenes.encoded("PNG", Image.new("RGB", (1, 1))), suffix=".png"),
        "image: too small",
    ),
    ("no_caption", files(txt=None), "caption: missing"),
    ("no_picture", files(jpg=None), "image: missing"),
    ("link_to_nothing", _link("nowhere.jpg"), "image: missing"),
    ("link_to_itself", _link("{name}.jpg"), "image: missing"),
    ("two_of_a_name", _two_of_a_name, [GOOD, "id: duplicate"]),
    (
        "other_file",
        lambda folder, name: (folder / f"{name}.pdf").write_bytes(b"%PDF-1.7"),
        "file: neither image nor .txt",
    ),
    ("caption_empty", files(txt=b""), "caption: empty"),
    ("caption_spaces", files(txt=b" \n\t \r\n"), "caption: empty"),
    ("caption_zero_width", files(txt="\u200b\ufeff\u2060".encode()), "caption: empty"),
    ("caption_latin1", files(txt="ein Bär".encode("latin-1")), "caption: not UTF-8"),
    ("caption_utf16", files(txt="a bear".encode("utf-16")), GOOD),
    ("caption_huge", files(txt=b"word " * MAX_CHARS), "caption: too long"),
    ("caption_nul", files(txt=b"a red\0wall"), "caption: control characters"),
    ("caption_escape", files(txt=b"\x1b[31ma red wall"), "caption: control characters"),
    ("caption_bom", files(txt=b"\xef\xbb\xbfa red wall"), GOOD),
    ("caption_crlf", files(txt=b"a red\r\nwall\r\n"), GOOD),
    ("caption_chinese", files(txt="红色的墙 🧱".encode()), GOOD),
    ("caption_with_tags", files(txt=b"<image_placeholder><image> a wall"), GOOD),
    ("png_named_jpg", files(PNG), GOOD),
    ("jpg_named_webp", files(suffix=".webp"), GOOD),
    ("upper_case", files(suffix=".JPG"), GOOD),
    ("cmyk", files(scenes.encoded("JPEG", _mode("CMYK"))), GOOD),
    ("grey", files(scenes.encoded("JPEG", _mode("L"))), GREY),
    ("grey_alpha", files(scenes.encoded("PNG", _mode("LA")), suffix=".png"), GREY),
    ("grey_16_bit", files(scenes.encoded("PNG", _GREY16), suffix=".png"), GREY),
    ("palette", files(scenes.encoded("PNG", _mode("P")), suffix=".png"), GOOD),
    ("palette_clear", files(scenes.encoded("PNG", _clear("P")), suffix=".png"), GOOD),
    ("rgba", files(scenes.encoded("PNG", _clear()), suffix=".png"), GOOD),
    (
        "webp_alpha",
        files(scenes.encoded("WEBP", _clear(), lossless=True), suffix=".webp"),
        GOOD,
    ),
    ("exif_right", files(scenes.turned(6)), GOOD),
    ("exif_upside_down", files(scenes.turned(3)), GOOD),
    (
        "exif_broken",
        files(scenes.encoded(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")),
        GOOD,
    ),
    ("progressive", files(scenes.encoded(progressive=True)), GOOD),
    ("trailing_bytes", files(JPG + b"appended by some camera"), GOOD),
    ("animated_webp", files(scenes.animated("WEBP"), suffix=".webp"), GOOD),
    ("animated_png", files(scenes.animated("PNG"), suffix=".png"), GOOD),
    ("loop_of_folders", _loop, GOOD),
]


def row(**changes: object):
    """A JSON line; `...` leaves a field out."""

    def make(name: str) -> bytes:
        fields = {"id": name, "image": "good.jpg", "caption": f"a wall, {name}"} | changes
        return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()

    return make


def line(data: bytes):
    return lambda name: data.replace(b"NAME", name.encode())


ROWS = [
    ("first", line(b'\xef\xbb\xbf{"id": "NAME", "image": "good.jpg", "caption": "a wall"}'), GOOD),
    ("row_good", row(), GOOD),
    ("row_blank", line(b"   "), []),
    ("row_broken", line(b'{"id": "NAME", "image": "good.jpg", "caption": "a wa'), "line: not JSON"),
    ("row_two_objects", line(b'{"id": "NAME"} {"id": "b"}'), "line: not JSON"),
    ("row_deep", line(b"[" * 100_000), "line: not JSON"),
    ("row_list", line(b'["good.jpg", "a wall"]'), "row: not an object"),
    ("row_number", line(b"17"), "row: not an object"),
    (
        "row_latin1",
        line('{"image": "good.jpg", "caption": "Bär"}'.encode("latin-1")),
        "line: not UTF-8",
    ),
    ("image_absent", row(image=...), "image: missing"),
    ("image_null", row(image=None), "image: missing"),
    ("image_empty", row(image=""), "image: missing"),
    ("image_nan", row(image=float("nan")), "image: missing"),
    ("image_number", row(image=7), "image: neither path nor bytes"),
    ("image_object", row(image={"path": "good.jpg"}), "image: missing"),
    ("image_two", row(image=["good.jpg", "good.jpg"]), "image: more than one"),
    ("image_no_file", row(image="gone.jpg"), "image: missing"),
    ("image_long_name", row(image="x" * 300 + ".jpg"), "image: missing"),
    ("image_nul_name", row(image="good\0.jpg"), "image: missing"),
    ("image_below_file", row(image="good.jpg/x.jpg"), "image: not a file"),
    ("image_is_folder", row(image="sub"), "image: not a file"),
    ("image_traversal", row(image="../secret.jpg"), "image: outside its folder"),
    ("image_traversal_inside", row(image="sub/../../secret.jpg"), "image: outside its folder"),
    ("image_traversal_windows", row(image="..\\secret.jpg"), "image: outside its folder"),
    ("image_absolute", row(image="/etc/passwd"), "image: outside its folder"),
    ("image_url", row(image="https://example.org/a.jpg"), "image: a web address, not a file"),
    ("image_file_url", row(image="file:///etc/passwd"), "image: a web address, not a file"),
    ("image_truncated", row(image="half.jpg"), "image: truncated or broken"),
    ("caption_absent", row(caption=...), "caption: missing"),
    ("caption_null", row(caption=None), "caption: missing"),
    ("caption_nan", row(caption=float("nan")), "caption: missing"),
    ("caption_number", row(caption=3.5), "caption: not text"),
    ("caption_object", row(caption={"en": "a wall"}), "caption: not text"),
    ("caption_half_character", row(caption="a \ud83d wall"), "caption: not UTF-8"),
    ("caption_control", row(caption="a \u0007 wall"), "caption: control characters"),
    ("captions_none", row(caption=..., captions=[]), "caption: missing"),
    ("captions_all_bad", row(caption=..., captions=["", None, 3]), "caption: empty"),
    ("captions_some_bad", row(caption=..., captions=["", "a wall", None]), GOOD),
    ("id_null", row(id=None), GOOD),
    ("id_number", row(id=17), GOOD),
    ("id_list", row(id=["a"]), "id: neither text nor number"),
    ("id_bool", row(id=True), "id: neither text nor number"),
    ("id_empty", row(id=""), "id: empty"),
    ("id_again", row(id="row_good"), "id: duplicate"),
]

CSV = [
    ("csv_good", b"csv_good,good.jpg,a wall", GOOD),
    ("csv_new_line", b'csv_new_line,good.jpg,"a wall,\nin ""red"""', GOOD),
    (
        "csv_too_many",
        b"csv_too_many,good.jpg,a wall,and,more",
        "line: more columns than the header",
    ),
    ("csv_too_few", b"csv_too_few,good.jpg", "caption: missing"),
    ("csv_empty_caption", b"csv_empty_caption,good.jpg,", "caption: empty"),
    ("csv_latin1", "csv_latin1,good.jpg,ein Bär".encode("latin-1"), "caption: not UTF-8"),
    ("csv_no_file", b"csv_no_file,gone.jpg,a wall", "image: missing"),
    ("csv_traversal", b"csv_traversal,../secret.jpg,a wall", "image: outside its folder"),
    ("csv_again", b"csv_good,good.jpg,a wall", "id: duplicate"),
]
