"""WebDataset tars, read as a stream: nothing is extracted, and no name in a tar is ever opened.

The members of a sample stand together and share the name up to the first dot: jpg, png or webp,
with txt, json or cls. Several images of a sample (`key.0.jpg`, `key.1.jpg`) come in natural order;
`image_field` names the one to read (`mask.png`).
"""

from __future__ import annotations

import itertools
import tarfile
import unicodedata
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax.data.prepare import inputs, records
from janusflow_jax.data.prepare.inputs import Row, Skipped
from janusflow_jax.data.prepare.records import Options

KINDS = ("captions", "conversation", "document")
SUFFIXES = (".tar", ".tar.gz", ".tgz")


def plan(options: Options, slices: epath.Path) -> Iterator[dict]:
    """Shards: the tars."""
    del slices
    for path, name in inputs.files(options.inputs, SUFFIXES):
        yield {"path": str(path), "name": name}


def read(shard: dict, options: Options) -> Iterator[Row]:
    """The samples of one tar; of a broken tar, those before the break.

    Raises:
      Skipped: the tar is missing or broken. The sample that was being read may lack members, so it
        is lost.
    """
    name = shard["name"]
    errors = (tarfile.TarError, UnicodeError)
    with inputs.open_file(epath.Path(shard["path"]), broken=errors) as stream:
        members = _members(stream, options.max_bytes)
        for key, group in itertools.groupby(members, lambda member: member[0]):
            contents = [(extension, content) for _, extension, content in group]
            place_id = f"{name}/{key}" if options.ids == "place" else key
            try:
                if len(dict(contents)) < len(contents):
                    raise Skipped("tar: two members of one name")
                row = _fields(dict(contents), place_id, options)
            except Skipped as e:
                row = e
            yield f"{name}:{key}", place_id, row


class _Member(tarfile.TarInfo):
    """tarfile takes a truncated or broken header for the end of the tar; this class raises."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as e:
            if type(e).__name__ == "EOFHeaderError":  # the block of zeros that ends every tar
                raise
            raise tarfile.ReadError(f"{e}: expected a member or the end") from e


def _members(stream: Any, max_bytes: int) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of every file; of a large one, the first `max_bytes` + 1 bytes.

    Raises:
      tarfile.TarError: the tar ends too soon or is broken.
    """
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            base, _, extension = base.partition(".")
            key = unicodedata.normalize("NFC", folder + slash + base)
            if key and member.isreg():  # no key: .DS_Store and the like
                content: Any = tar.extractfile(member)
                yield key, extension.lower(), content.read(max_bytes + 1)


def _fields(sample: dict[str, bytes], place_id: str, options: Options) -> dict[str, Any]:
    """The fields of the JSON, with the sample's key as id and its members as images and caption."""
    row = inputs.parse_json(sample["json"]) if sample.get("json") else {}
    if isinstance(row, Skipped):
        raise row
    if not isinstance(row, dict):
        raise Skipped("row: not an object", type(row).__name__)
    members = f"the members are {', '.join(sample)}"
    media = {extension: records.medium_of_file(f".{extension}") for extension in sample}
    for extension, medium in media.items():
        if medium in ("video", "audio"):
            raise Skipped(f"{medium}: not read", f"member {extension}")
    extensions = [e for e in sorted(media, key=inputs.natural_key) if media[e] == "image"]
    if options.image_field:
        extensions = [e for e in sample if e == options.image_field.lower()]
    if options.kind == "captions" and len(extensions) != 1:
        raise Skipped(f"image: {'more than one' if extensions else 'missing'}", members)
    images = [sample[extension] for extension in extensions]
    # the images are members of the tar, not what the JSON names
    fields = {name: value for name, value in row.items() if name not in records.IMAGE_FIELDS}
    fields |= {"id": place_id, options.image_field or "images": images}
    if options.kind == "captions":
        caption = _captions(sample, row, options)
        if caption is None:
            fields_of_json = f"; json has {', '.join(row)}" if row else ""
            raise Skipped("caption: missing", f"{members}{fields_of_json}"[:160])
        fields[options.text_field or "captions"] = caption
    return fields


def _captions(sample: dict[str, bytes], row: dict, options: Options) -> Any:
    """From .txt, else from the usual fields of the JSON, else the name of the class."""
    text = next((sample[name] for name in ("txt", "caption", "text") if name in sample), None)
    if text is not None and not options.text_field:
        return text
    field = records.field_of(row, options.text_field, records.CONTENT_FIELDS["captions"])
    if field or "cls" not in sample:
        return row.get(field)
    value = sample["cls"]
    number = value.decode("utf-8", errors="replace").strip()
    if not number.isdecimal():
        return value  # a name already
    if int(number) >= len(options.classes):
        detail = f"{number} of {len(options.classes)}; `classes` gives the names"
        raise Skipped("caption: class without a name", detail)
    return options.classes[int(number)]
