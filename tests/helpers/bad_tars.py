"""Bad and odd WebDataset tars, made with plain tarfile in img2dataset's layout.

A case is (name, how to make its tar, what must come out of it).
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from helpers import scenes
from helpers.bad_folder import GOOD, JPG, MAX_BYTES

BLOCK = tarfile.BLOCKSIZE


def tar(*members: tuple[str, object], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    """Members in order: (name, bytes), or (name, TarInfo type and link target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as file:  # pyright: ignore
        for name, value in members:
            info = tarfile.TarInfo(name)
            if isinstance(value, bytes):
                info.size = len(value)
                file.addfile(info, io.BytesIO(value))
            else:
                info.type, info.linkname = value
                file.addfile(info)
    return out.getvalue()


def sample(key: str, **members: bytes) -> list[tuple[str, object]]:
    """A picture as img2dataset stores it; members replace or add (None: leave out)."""
    about = {
        "caption": f"a wall, {key}",
        "url": "https://example.org/a.jpg",
        "key": key,
        "status": "success",
        "width": 96,
        "height": 64,
        "original_width": 192,
    }
    files = {"jpg": JPG, "json": json.dumps(about).encode(), "txt": f"a wall, {key}".encode()}
    return [(f"{key}.{e}", v) for e, v in (files | members).items() if v is not None]


def only(**members):
    """A tar of one sample, named as the case."""
    return lambda name: tar(*sample(name, **members))


def extra(*members, before: bool = False):
    """A good sample, and other members behind it (or in front); NAME is replaced."""

    def make(name: str) -> bytes:
        others = [(n.replace("NAME", name), v) for n, v in members]
        good = sample(f"{name}_0")
        return tar(*(others + good if before else good + others))

    return make


def _cut(end: int, samples: int = 2):
    """A tar of some samples, cut at a byte (from the end where negative)."""

    def make(name: str) -> bytes:
        whole = tar(*(m for i in range(samples) for m in sample(f"{name}_{i}")))
        used = len(whole.rstrip(b"\0"))
        return whole[: used + end if end < 0 else end]

    return make


def _broken_header(name: str) -> bytes:
    whole = bytearray(tar(*sample(f"{name}_0"), *sample(f"{name}_1")))
    at = whole.index(f"{name}_1.jpg".encode())
    whole[at + 100 : at + 108] = b"\xff" * 8
    return bytes(whole)


def _twice(name: str) -> bytes:
    return tar(*sample(f"{name}_0"), *sample(f"{name}_1"), *sample(f"{name}_0"))


_TWO = b'{"caption": 1, "caption": '
LINK, HARD, FIFO = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE
BROKEN = "file: truncated or broken"

TARS = [
    ("wds_plain", only(), GOOD),
    ("wds_txt_only", only(json=None), GOOD),
    ("wds_json_only", only(txt=None), GOOD),
    ("wds_png", only(jpg=None, png=scenes.encoded("PNG")), GOOD),
    ("wds_webp", only(jpg=None, webp=scenes.encoded("WEBP")), GOOD),
    ("wds_upper_case", only(jpg=None, JPG=JPG), GOOD),
    ("wds_cmyk", only(jpg=scenes.encoded("JPEG", scenes.scene().convert("CMYK"))), GOOD),
    ("wds_class", only(json=None, txt=None, cls=b"1"), GOOD),
    ("wds_class_word", only(json=None, txt=None, cls=b"tabby cat"), GOOD),
    ("wds_class_beyond", only(json=None, txt=None, cls=b"7"), "caption: class without a name"),
    ("wds_gnu_long_name", lambda name: tar(*sample("d" * 150 + "/" + name), form=1), GOOD),
    ("wds_pax_long_name", lambda name: tar(*sample("é" * 150 + "/" + name)), GOOD),
    ("wds_folder_members", extra(("NAME", (tarfile.DIRTYPE, "")), before=True), GOOD),
    ("wds_dot_files", extra((".DS_Store", b"x"), ("._NAME.jpg", b"x")), GOOD),
    ("wds_other_members", only(npy=b"\x93NUMPY", url=b"https://example.org"), GOOD),
    ("wds_large_other_member", only(npy=bytes(MAX_BYTES + 1)), GOOD),
    ("wds_no_picture", only(jpg=None), "image: missing"),
    ("wds_no_text", only(txt=None, json=None), "caption: missing"),
    ("wds_caption_null", only(txt=None, json=b'{"caption": null}'), "caption: missing"),
    ("wds_caption_number", only(txt=None, json=b'{"caption": 7}'), "caption: not text"),
    ("wds_caption_empty", only(txt=b" "), "caption: empty"),
    ("wds_caption_latin1", only(txt=b"B\xe4r"), "caption: not UTF-8"),
    ("wds_json_broken", only(txt=None, json=_TWO), "line: not JSON"),
    ("wds_json_latin1", only(txt=None, json=b'{"caption": "B\xe4r"}'), "line: not UTF-8"),
    ("wds_json_list", only(txt=None, json=b"[1]"), "row: not an object"),
    ("wds_neither", extra(("NAME_1.npy", b"x")), [GOOD, "image: missing"]),
    ("wds_picture_empty", only(jpg=b""), "image: 0 bytes"),
    ("wds_picture_cut", only(jpg=JPG[:900]), "image: truncated or broken"),
    (
        "wds_picture_gif",
        only(jpg=None, gif=scenes.encoded("GIF")),
        "image: not JPEG, PNG or WebP",
    ),
    ("wds_two_pictures", only(png=scenes.encoded("PNG")), "image: more than one"),
    ("wds_large_member", only(jpg=bytes(MAX_BYTES + 1)), "image: too many bytes"),
    (
        "wds_two_members",
        extra(("NAME_1.jpg", JPG), ("NAME_1.txt", b"a"), ("NAME_1.txt", b"b")),
        [GOOD, "tar: two members of one name"],
    ),
    ("wds_same_key", _twice, [GOOD, GOOD, "id: duplicate"]),
    (
        "wds_traversal",
        extra(("../NAME_1.jpg", JPG), ("../NAME_1.txt", b"a wall")),
        [GOOD, GOOD],
    ),
    ("wds_absolute", extra(("/nowhere/NAME_1.jpg", JPG)), [GOOD, "caption: missing"]),
    (
        "wds_symlink",
        extra(("NAME_1.jpg", (LINK, "/etc/passwd")), ("NAME_1.txt", b"a wall")),
        [GOOD, "image: missing"],
    ),
    (
        "wds_hard_link",
        extra(("NAME_1.jpg", (HARD, "NAME_0.jpg")), ("NAME_1.txt", b"a wall")),
        [GOOD, "image: missing"],
    ),
    ("wds_fifo", extra(("NAME_1.jpg", (FIFO, ""))), GOOD),
    ("wds_cut_in_member", _cut(3 * BLOCK, samples=1), BROKEN),
    ("wds_cut_in_second", _cut(-700), [GOOD, BROKEN]),
    (
        "wds_cut_in_header",
        _cut(len(tar(*sample("wds_cut_in_header_0")).rstrip(b"\0")) // BLOCK * BLOCK + BLOCK + 100),
        BROKEN,
    ),
    (
        "wds_cut_before_end",
        _cut(
            len(tar(*sample("wds_cut_before_end_0")).rstrip(b"\0")) // BLOCK * BLOCK + BLOCK,
            samples=1,
        ),
        BROKEN,
    ),
    ("wds_broken_header", _broken_header, BROKEN),
    ("wds_empty_file", lambda name: b"", BROKEN),
    ("wds_no_tar", lambda name: b"<html>404 not found</html>" * 100, BROKEN),
    ("wds_no_members", lambda name: tar(), "file: empty"),
    ("wds_garbage", lambda name: bytes(range(256)) * 40, BROKEN),
]

GZIPPED = [
    ("gz_good", lambda name: gzip.compress(tar(*sample(name))), GOOD),
    ("gz_cut", lambda name: gzip.compress(tar(*sample(name)))[:-200], BROKEN),
    ("gz_no_gz", only(), BROKEN),
]


def write(folder: Path) -> None:
    """Every case's tar."""
    for name, make, _ in TARS:
        (folder / f"{name}.tar").write_bytes(make(name))
    for name, make, _ in GZIPPED:
        (folder / f"{name}.tar.gz").write_bytes(make(name))


CASES = [*TARS, *GZIPPED]
