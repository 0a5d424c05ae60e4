"""WebDataset tars, read as a stream: nothing is extracted, and no name in them is ever opened.

Members of one sample share the name up to the first dot, and stand together: jpg, png or webp, with
txt, json or cls. Several pictures of a sample (`key.0.jpg`, `key.1.jpg`) come in order of names.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import fields, inputs, lines, pictures
from janusflow_jax.data.prepare.raw import Options, Raw, Skip, Skipped

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXTS = ("txt", "caption", "text")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: the tars."""
    del slices
    for path, name in inputs.files(options, SUFFIXES):
        yield {"path": str(path), "name": name}


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[Raw | Skip]:
    """The samples of one tar. What stands in front of a broken place comes."""
    del slices
    path, name = epath.Path(shard["path"]), shard["name"]
    key, sample = "", {}
    try:
        with inputs.open_file(path) as file:
            for found, ext, value in _members(file, name, options.max_bytes):
                if found != key:
                    yield from _sample(name, key, sample, options)
                    key, sample = found, {}
                again = Skipped("tar: two members of one name", ext)
                sample[ext] = again if ext in sample else value
    except (tarfile.TarError, *lines.BROKEN, UnicodeError) as e:
        # the sample that was being read may lack members
        yield Skip(f"{name}:{key}", "file: truncated or broken", str(e))
        return
    except Skipped as e:
        yield Skip(name, e.reason, e.detail)
        return
    if not key and not sample:
        yield Skip(name, "file: empty", "a tar without members")
    yield from _sample(name, key, sample, options)


def _members(file: Any, name: str, max_bytes: int) -> Iterator[tuple[str, str, Any]]:
    """(key, extension, bytes or what is wrong) of every member but folders.

    Raises:
      tarfile.TarError: the tar ends too soon or is broken.
    """
    stream = gzip.GzipFile(fileobj=file) if name.endswith(("gz",)) else file
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in _headers(tar):
            if member.isdir():
                continue
            folder, slash, base = member.name.rpartition("/")
            base, _, ext = base.partition(".")
            key, ext = folder + slash + base, ext.lower()
            if not key:
                continue  # .DS_Store and its like
            yield key, ext, _content(tar, member, max_bytes)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members. tarfile's own iteration takes a header that is cut or broken for the end."""
    members: Any = tar
    found = members.firstmember
    if found is None:
        return  # a tar of nothing but its end
    while True:
        yield found
        if members.offset != members.fileobj.tell():
            members.fileobj.seek(members.offset - 1)
            if not members.fileobj.read(1):
                raise tarfile.ReadError("unexpected end of data")
        try:
            found = tar.tarinfo.fromtarfile(tar)
        except tarfile.HeaderError as e:
            if type(e).__name__ == "EOFHeaderError":  # the block of zeros that ends every tar
                return
            raise tarfile.ReadError(f"{e}, where a member or the end should stand") from e


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> Any:
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith("/") or ".." in parts:
        return Skipped("tar: name outside the tar", member.name[:120])
    if not member.isreg():
        return Skipped("tar: link or device, not a file", member.name[:120])
    if member.size > max_bytes:
        return Skipped("tar: member with too many bytes", f"{member.name}: {member.size:,}"[:120])
    opened = tar.extractfile(member)
    return opened.read() if opened else b""


def _sample(name: str, key: str, sample: dict[str, Any], options: Options) -> Iterator[Raw | Skip]:
    """The members of a key as a raw record."""
    if not sample:
        return
    where = f"{name}:{key}"
    place_id = f"{name}/{key}" if options.ids == "place" else key
    try:
        for value in sample.values():
            if isinstance(value, Skipped):
                raise value
        suffixes = pictures.SUFFIXES + pictures.REFUSED
        found = [sample[e] for e in sorted(sample) if f".{e.rpartition('.')[2]}" in suffixes]
        row: Any = lines.parse(sample["json"]) if sample.get("json") else {}
        if not isinstance(row, dict):
            raise Skipped("row: not an object", f"{key}.json: {type(row).__name__}")
        if not row and not found and not any(t in sample for t in (*_TEXTS, "cls")):
            raise Skipped("sample: neither picture nor text", ", ".join(sorted(sample))[:80])
        if options.kind != "captions":
            raw = fields.raw(
                {"image": found} | _fields(row, options), where, place_id, options, _own
            )
            yield Raw(where, place_id, raw.images, turns=raw.turns, text=raw.text)
            return
        yield Raw(where, place_id, found, captions=_captions(sample, row, options))
    except Skipped as e:
        yield Skip(where, e.reason, e.detail)


def _fields(row: dict, options: Options) -> dict:
    """The row without what names pictures: they are members of the tar."""
    return {k: v for k, v in row.items() if k not in fields.IMAGE and k != options.image_field}


def _own(picture: bytes) -> bytes:
    return picture


def _captions(sample: dict[str, bytes], row: dict, options: Options) -> Any:
    """Of .txt, else of the JSON's usual fields, else the class's name."""
    given = options.text_field
    text = next((t for t in _TEXTS if t in sample), "")
    if text and not given:
        return sample[text]
    field = fields.find(row, given, fields.CAPTION)
    if field or "cls" not in sample:
        return row.get(field)
    return _class_name(sample["cls"], options.classes)


def _class_name(value: bytes, classes: tuple[str, ...]) -> Any:
    text = value.decode("utf-8", errors="replace").strip()
    if not text.isdecimal():
        return value  # a name already
    if not classes:
        raise Skipped("caption: only a class's number", f"{text} (--classes names a file of names)")
    if int(text) >= len(classes):
        raise Skipped("caption: class without a name", f"{text} of {len(classes)}")
    return classes[int(text)]
