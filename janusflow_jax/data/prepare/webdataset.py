"""WebDataset tars, read as a stream: nothing is extracted, and no name in a tar is ever opened.

The members of a sample stand together and share the name up to the first dot: jpg, png or webp,
with txt, json or cls. Several images of a sample (`key.0.jpg`, `key.1.jpg`) come in order of their
names.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import tarfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options, RawRecord

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXTS = ("txt", "caption", "text")


def read(shard: dict, options: Options, slices: epath.Path) -> Iterator[records.Item]:
    """The samples of one tar; of a broken tar, those before the break."""
    del slices
    rows = _samples(epath.Path(shard["path"]), shard["name"], options)
    return records.convert(rows, lambda sample, place_id: _raw(sample, place_id, options))


def _samples(path: epath.Path, name: str, options: Options) -> Iterator[Row]:
    """Samples {extension: bytes}, one a key."""
    key = ""
    try:
        with inputs.open_file(path) as file:
            members = _members(file, name, options.max_bytes)
            for key, group in itertools.groupby(members, lambda member: member[0]):
                sample: dict[str, Any] = {}
                for _, extension, value in group:
                    if extension in sample:
                        value = Skipped("tar: two members of one name", extension)
                    sample[extension] = value
                place_id = f"{name}/{key}" if options.ids == "place" else key
                yield f"{name}:{key}", place_id, sample
    except (tarfile.TarError, *inputs.BROKEN, UnicodeError) as e:
        # the sample that was being read may lack members, so it is lost
        yield f"{name}:{key}", "", Skipped("file: truncated or broken", str(e))
        return
    except Skipped as e:
        yield name, "", e
        return
    if not key:
        yield name, "", Skipped("file: empty", "a tar without members")


def _members(file: Any, name: str, max_bytes: int) -> Iterator[tuple[str, str, Any]]:
    """(key, extension, bytes or Skipped) of every member except folders.

    Raises:
      tarfile.TarError: the tar ends too soon or is broken.
    """
    stream = gzip.GzipFile(fileobj=file) if name.endswith("gz") else file
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in _headers(tar):
            folder, slash, base = member.name.rpartition("/")
            base, _, extension = base.partition(".")
            key = folder + slash + base
            if key and not member.isdir():  # no key: .DS_Store and the like
                yield key, extension.lower(), _content(tar, member, max_bytes)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members. tarfile's own iteration takes a truncated or broken header for the end."""
    stream: Any = tar
    member = stream.firstmember
    if member is None:
        return  # a tar without members
    while True:
        yield member
        if stream.offset != stream.fileobj.tell():
            stream.fileobj.seek(stream.offset - 1)
            if not stream.fileobj.read(1):
                raise tarfile.ReadError("unexpected end of data")
        try:
            member = tar.tarinfo.fromtarfile(tar)
        except tarfile.HeaderError as e:
            if type(e).__name__ == "EOFHeaderError":  # the block of zeros that ends every tar
                return
            raise tarfile.ReadError(f"{e}: expected a member or the end") from e


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> Any:
    """The member's bytes, or a Skipped."""
    if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
        return Skipped("tar: name outside the tar", member.name[:120])
    if not member.isreg():
        return Skipped("tar: link or device, not a file", member.name[:120])
    if member.size > max_bytes:
        return Skipped("tar: member with too many bytes", f"{member.name}: {member.size:,}"[:120])
    opened = tar.extractfile(member)
    return opened.read() if opened else b""


def _raw(sample: dict[str, Any], place_id: str, options: Options) -> RawRecord:
    for value in sample.values():
        if isinstance(value, Skipped):
            raise value
    row = inputs.parse_json(sample["json"]) if sample.get("json") else {}
    if not isinstance(row, dict):
        raise Skipped("row: not an object", type(row).__name__)
    images = [
        sample[extension]
        for extension in sorted(sample)
        if f".{extension.rpartition('.')[2]}" in records.IMAGE_SUFFIXES
    ]
    if not row and not images and not any(name in sample for name in (*_TEXTS, "cls")):
        raise Skipped("sample: neither picture nor text", ", ".join(sorted(sample))[:80])
    if options.kind == "captions":
        return RawRecord(place_id, images, _captions(sample, row, options))
    # the images are members of the tar, not what the JSON names
    fields = {k: v for k, v in row.items() if k not in (*records.IMAGE_FIELDS, options.image_field)}
    raw = records.raw_record(fields, place_id, options)
    return dataclasses.replace(raw, id=place_id, images=images)


def _captions(sample: dict[str, bytes], row: dict, options: Options) -> Any:
    """From .txt, else from the usual fields of the JSON, else the name of the class."""
    text = next((name for name in _TEXTS if name in sample), "")
    if text and not options.text_field:
        return sample[text]
    field = records.field_of(row, options.text_field, records.CONTENT_FIELDS["captions"])
    if field or "cls" not in sample:
        return row.get(field)
    value = sample["cls"]
    number = value.decode("utf-8", errors="replace").strip()
    if not number.isdecimal():
        return value  # a name already
    if not options.classes:
        raise Skipped("caption: only a class's number", f"{number}; `classes` gives the names")
    if int(number) >= len(options.classes):
        detail = f"{number} of {len(options.classes)}"
        raise Skipped("caption: class without a name", detail)
    return options.classes[int(number)]
