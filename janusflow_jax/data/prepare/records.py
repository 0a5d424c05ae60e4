"""Rows -> records of the data set, or the reason why a row is skipped.

Every format comes through here: fields by their usual names, then checks of ids, texts and images.
Reasons such as 'image: missing' are keys of report.json: their wording should not change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from etils import epath
from PIL import Image

from janusflow_jax.config.errors import DataError
from janusflow_jax.config.files import text_encoding
from janusflow_jax.data import images
from janusflow_jax.data.prepare import inputs
from janusflow_jax.data.prepare.inputs import Skipped

KINDS = ("captions", "conversation", "document", "text")
"""What a record holds; see `data/samples.py`."""
SPLITS = ("train", "heldout")

ID_FIELDS = ("id", "key", "__key__", "uid")
IMAGE_FIELDS = (
    *("image", "images", "file_name", "filename", "path", "img", "picture"),
    *("image_path", "image_bytes", "jpg", "jpeg", "png", "webp"),
)
CONTENT_FIELDS = {
    "captions": (
        *("captions", "caption", "text", "txt", "sentence", "sentences", "description", "prompt"),
    ),
    "conversation": ("conversations", "conversation", "messages", "texts"),
    "document": ("text", "content", "document", "body", "texts"),
    "text": ("text", "content", "document", "body"),
}
"""The usual names of fields; the first that a row has is read."""
_DECODED = ("jpg", "jpeg", "png", "webp")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"),
    *(".jp2", ".jxl", ".svg", ".ico", ".psd", ".ppm"),
)
"""Files that are images by their names. Only the first line is decoded; the others are counted as
skipped instead of being ignored."""
MEDIA = {
    "image": (("image", "img", "picture", "photo", *_DECODED), IMAGE_SUFFIXES),
    "video": (
        ("video", "clip"),
        (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"),
    ),
    "audio": (
        ("audio", "sound", "speech"),
        (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma"),
    ),
}
"""Medium -> (words in names of its fields, suffixes of its files)."""
USER_ROLES = ("user", "human", "prompter", "<|user|>")
ASSISTANT_ROLES = ("assistant", "gpt", "chatgpt", "bot", "model", "<|assistant|>")
_TURN_FIELDS = ("from", "value", "role", "content", "user", "assistant", "image", "images")
"""The fields of a turn that are read."""

_JPEG_QUALITY = 95
_IMAGE_NAME = re.compile(rf"(.*[_.-])?({'|'.join(MEDIA['image'][0])})s?[_.-]?[0-9]*")
"""Names of fields that hold an image, not its size or address."""
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")
_DRIVE = re.compile(r"^[A-Za-z]:[/\\]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a data set is prepared. The same options and inputs give the same files."""

    format: str  # a name of `build.FORMATS`
    inputs: tuple[str, ...]
    kind: str = "captions"
    images: str = ""  # folder that the paths of images are relative to
    rows: str = ""  # format folder: a JSON-lines or CSV file that names the images
    image_field: str = ""  # '': the usual names
    text_field: str = ""
    id_field: str = ""
    classes: tuple[str, ...] = ()  # names by number, for WebDataset's .cls
    ids: str = "given"  # given | place (file and place, for ids that repeat from file to file)
    documents: str = "line"  # format text, .txt: line | file
    image_marker: str = "<image>"
    image_tag: str = "<image_placeholder>"
    heldout: float = 0.0  # share of the records, chosen by a hash of the id, no image in both
    tokenizer: str = ""
    lengths: tuple[str, ...] = ()  # TASK:FORM
    max_side: int = 0  # pixels; larger images are shrunk; 0: images stay as they are
    min_side: int = 16
    max_aspect: float = 20.0
    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 2**20
    max_chars: int = 100_000  # of a caption or a turn
    max_document: int = 50_000_000  # characters of a document
    shard_records: int = 4096
    shard_bytes: int = 256 * 2**20  # of text files


def field_of(names: Iterable[str], chosen: str, usual: tuple[str, ...]) -> str | None:
    """The chosen field, or the first of the usual ones; None if there is none."""
    names = list(names)
    return next((name for name in ([chosen] if chosen else usual) if name in names), None)


def to_record(row: Any, place_id: str, options: Options) -> tuple[dict[str, Any], list[Skipped]]:
    """A record with the fields of `data/samples.py`; images stay encoded.

    Texts are checked before images, because images cost more.

    Args:
      row: fields by name, of a JSON object or of a table's row. A text is a str, UTF-8 bytes or a
        path; for an image, see `load_image`.
      place_id: the id if the row has none, or if `options.ids` is 'place'.
      options: names of fields, kind and limits.
    Returns:
      (record, captions that were dropped because others can be used).
    Raises:
      Skipped: it cannot be used.
    """
    if not isinstance(row, dict):
        raise Skipped("row: not an object", type(row).__name__)
    row = {name: value for name, value in row.items() if not _is_null(value)}
    id_field = field_of(row, options.id_field, ID_FIELDS)
    if options.id_field and not id_field:
        raise Skipped("id: missing", _fields(row))
    record_id = row[id_field] if id_field and options.ids == "given" else place_id
    if isinstance(record_id, float) and record_id.is_integer():
        record_id = int(record_id)  # a column of numbers with gaps is read as floats
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise Skipped("id: neither text nor number", _brief(record_id))
    record: dict[str, Any] = {"id": clean_text(str(record_id), "id", 4096)}
    text_value = content = _content(row, options)
    if options.kind == "text":
        if content is None:
            raise Skipped("text: missing", _fields(row))
        return record | {"text": clean_text(content, "text", options.max_document)}, []
    image_field = field_of(row, options.image_field, IMAGE_FIELDS)
    values = _listed(row[image_field]) if image_field else []
    if options.kind == "conversation":
        content = _turns(content)
        values = _images_of_turns(content, values)
    for name, value in row.items():
        is_read = name in (image_field, id_field) or value is text_value
        medium = "" if is_read else _unread(name, value, values)
        if medium and not (medium == "image" and options.image_field):
            _refuse(medium, f"field {name}: {_brief(value)}")
    if options.kind == "captions":
        if len(values) != 1:
            reason = "image: more than one" if values else "image: missing"
            raise Skipped(reason, f"expected one; got {len(values)}; {_fields(row)}")
        if content is None:
            raise Skipped("caption: missing", _fields(row))
        record["captions"], dropped = captions(content, options.max_chars)
        return record | {"image": load_image(values[0], options)}, dropped
    if content is None:
        what = "conversation" if options.kind == "conversation" else "text"
        raise Skipped(f"{what}: missing", _fields(row))
    if options.kind == "conversation":
        record["conversation"] = conversation(content, len(values), options)
    else:
        if isinstance(content, (list, tuple)):
            content = _join_texts(content, options.image_marker)
            values = [value for value in values if not _is_null(value)]
        text = mark_images(clean_text(content, "text", options.max_document), options)
        _check_marks(text.count(options.image_tag), len(values))
        record["text"] = text
    return record | {"images": [load_image(value, options) for value in values]}, []


def _content(row: dict[str, Any], options: Options) -> Any:
    """The caption or captions, turns or text; `sentences/raw` is the field raw of sentences."""
    outer, _, inner = options.text_field.partition("/")
    if not inner or options.text_field in row:
        field = field_of(row, options.text_field, CONTENT_FIELDS[options.kind])
        return row[field] if field else None
    value = row.get(outer)
    if isinstance(value, list):
        return [part.get(inner) for part in value if isinstance(part, dict)]
    return value.get(inner) if isinstance(value, dict) else None


def _listed(value: Any) -> list[Any]:
    """The values of a field that holds one or several; an empty text is none."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if value is None or value == "" else [value]


def _fields(row: dict[str, Any]) -> str:
    return f"the fields are {', '.join(map(str, row)) or 'all empty'}"[:160]


def _unread(name: Any, value: Any, images: list[Any]) -> str:
    """The medium (a key of MEDIA) of a field that is not read; '' if it only describes the record.

    Beside images that are read, names and addresses of images describe them.
    """
    name, values = str(name).lower(), _listed(value)
    if not values or values == images or name in ID_FIELDS:
        return ""
    for medium in ("video", "audio"):
        if name in (medium, f"{medium}s"):
            return medium
    first = values[0]
    if isinstance(first, dict):
        first = first.get("bytes") or first.get("path")
    if isinstance(first, bytes):
        return next((m for m, (words, _) in MEDIA.items() if any(w in name for w in words)), "")
    if not isinstance(first, str):
        return ""
    medium = medium_of_file(first)
    is_address = bool(_SCHEME.match(first))
    if images:
        return medium if _IMAGE_NAME.fullmatch(name) and not is_address else ""
    return medium if medium and (not is_address or any(w in name for w in MEDIA[medium][0])) else ""


def medium_of_file(name: str) -> str:
    """The medium of a file by its suffix, '' for another file."""
    return next((m for m, (_, ends) in MEDIA.items() if name.lower().endswith(ends)), "")


def _refuse(medium: str, detail: str) -> NoReturn:
    """Raises the Skipped of a record with a medium that is not read."""
    where = "in another field" if medium == "image" else "not read"
    raise Skipped(f"{medium}: {where}", detail)


def _join_texts(parts: Sequence[Any], marker: str) -> str:
    """OBELICS stores a document as a list of texts; an image takes the place of each null."""
    for part in parts:
        if not (_is_null(part) or isinstance(part, str)):
            raise Skipped("text: not text", f"part {_brief(part)}")
    return "\n".join(marker if _is_null(part) else part for part in parts)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _brief(value: Any) -> str:
    """Type and begin of a value, for details."""
    return f"{type(value).__name__} {str(value)[:40]}"


def split_of(record_id: str, heldout: float) -> str:
    """train or heldout, by a hash of the id alone: a larger share keeps what was held out.

    Of records that share an image, `build` takes the split of one for all.
    """
    return SPLITS[int(hash64(record_id, "split") / 2**64 < heldout)]


def hash64(value: str | bytes, purpose: str) -> int:
    data = value.encode() if isinstance(value, str) else value
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "big")


# Images


def load_image(image: Any, options: Options) -> bytes:
    """The encoded bytes of an image that decodes in full; shrunk if larger than `max_side`.

    Args:
      image: bytes, a path, a str (a path in the folder of images) or Hugging Face's {bytes, path}.
      options: folder and limits.
    Raises:
      Skipped: missing, not an image of a known format, too large, too small, too thin.
      DataError: the store fails repeatedly.
    """
    if isinstance(image, dict):
        image = image.get("bytes")
    if _is_null(image):
        raise Skipped("image: missing")
    if isinstance(image, str):
        image = _image_path(image, options)
    if isinstance(image, os.PathLike):
        image = inputs.read_bytes(epath.Path(image), "image", options.max_bytes)
    if not isinstance(image, bytes):
        raise Skipped("image: neither path nor bytes", _brief(image))
    data = image
    try:
        pixels = images.decode(data, options.max_pixels, options.max_bytes)
    except DataError as e:
        raise Skipped(f"image: {e.reason}", str(e)) from e
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    if short < options.min_side:
        raise Skipped("image: too small", f"{width} x {height}, at least {options.min_side}")
    if long > short * options.max_aspect:
        raise Skipped("image: too long and thin", f"{width} x {height}")
    if not options.max_side or long <= options.max_side:
        return data
    scale = options.max_side / long
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    out = io.BytesIO()
    if data.startswith(b"\x89PNG"):  # drawings and text stay sharp
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def _image_path(name: str, options: Options) -> epath.Path:
    """The path of an image that a row names: in the folder, or absolute and inside it.

    Raises:
      Skipped: a web address, or a path that leads out of the folder.
    """
    folder = options.images or (options.inputs[0] if options.format == "folder" else "")
    if not folder:
        raise Skipped("image: missing", f"{name[:80]}: `images` is the folder of the images")
    if not name.strip():
        raise Skipped("image: missing", "no name")
    if (medium := medium_of_file(name)) in ("video", "audio"):
        _refuse(medium, name[:120])
    for root in (str(folder), os.path.abspath(folder)):
        name = name.removeprefix(f"{root.rstrip('/')}/")
    if _SCHEME.match(name):
        raise Skipped("image: a web address, not a file", name[:120])
    slashes = name.replace("\\", "/")
    if slashes.startswith(("/", "~")) or _DRIVE.match(name) or ".." in slashes.split("/"):
        raise Skipped("image: outside its folder", name[:120])
    # file systems distinguish these forms; people cannot
    forms = [unicodedata.normalize(form, x) for x in (name, slashes) for form in ("NFC", "NFD")]
    paths = [epath.Path(folder) / form for form in dict.fromkeys([name, *forms])]
    return next((path for path in paths[1:] if not paths[0].exists() and path.exists()), paths[0])


# Texts


def clean_text(value: Any, what: str, max_chars: int) -> str:
    r"""The text, stripped, with \n at line ends.

    Args:
      value: str, bytes (UTF-8, or UTF-16 with a byte order mark), or the path of a file.
      what: its name in reasons: caption, turn, text, id.
      max_chars: longer texts are refused.
    Raises:
      Skipped: missing, empty, not text, not UTF-8, control characters, too long.
    """
    if value is None:
        raise Skipped(f"{what}: missing")
    if isinstance(value, os.PathLike):
        value = inputs.read_bytes(epath.Path(value), what, 4 * max_chars)
    if isinstance(value, bytes):
        if len(value) > 4 * max_chars:  # perhaps cut within a character
            raise Skipped(f"{what}: too long", f"more than {4 * max_chars:,} bytes")
        try:
            value = value.decode(text_encoding(value))
        except UnicodeDecodeError as e:
            near = value[e.start : e.start + 8]
            raise Skipped(f"{what}: not UTF-8", f"byte {e.start}: {near!r}") from e
    if not isinstance(value, str):
        raise Skipped(f"{what}: not text", _brief(value))
    if match := _SURROGATE.search(value):
        raise Skipped(f"{what}: not UTF-8", f"half a character at {match.start()}")
    text = value.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\x0b", "\n").replace("\x0c", "\n").strip()  # page breaks
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise Skipped(f"{what}: empty")
    if match := _CONTROL.search(text):
        raise Skipped(f"{what}: control characters", f"{match[0]!r} at {match.start()}")
    if len(text) > max_chars:
        raise Skipped(f"{what}: too long", f"{len(text):,} characters, at most {max_chars:,}")
    return text


def captions(value: Any, max_chars: int) -> tuple[list[str], list[Skipped]]:
    """(captions that can be used, why the others were dropped).

    Raises:
      Skipped: none can be used; the reason is that of the first one.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    good, dropped = [], []
    for one in values:
        try:
            good.append(clean_text(one, "caption", max_chars))
        except Skipped as e:
            dropped.append(e)
    if not good:
        raise dropped[0] if dropped else Skipped("caption: missing")
    return list(dict.fromkeys(good)), dropped


def mark_images(text: str, options: Options) -> str:
    """Replaces the source's image marker by our image tag.

    Raises:
      Skipped: the text holds our tag already, which would stand for an image.
    """
    if options.image_marker != options.image_tag and options.image_tag in text:
        detail = f"{options.image_tag}; if it marks images, set `image_marker` to it"
        raise Skipped("text: holds the image tag", detail)
    return text.replace(options.image_marker, options.image_tag)


def _check_marks(marks: int, count: int) -> None:
    if marks != count:
        which = "more" if marks < count else "fewer"
        raise Skipped(f"images: {which} than their marks", f"{count} images, {marks} marks")


# Conversations


def conversation(value: list[Any], num_images: int, options: Options) -> list[dict[str, str]]:
    """Turns {role, content}: an optional system turn, then user and assistant in turn.

    A question after the last answer is dropped, because it has no target.

    Args:
      value: turns {from, value}, {role, content} (content: text, or a list of texts and images) or
        {user, assistant}; see `_turns`.
      num_images: the number of images of the record.
      options: limits, image marker and tag.
    Raises:
      Skipped: the first thing that is wrong.
    """
    turns: list[dict[str, str]] = []
    in_pairs = False
    for turn in value:
        if not isinstance(turn, dict):
            raise Skipped("conversation: turn without role and text", type(turn).__name__)
        for name in turn.keys() - {*_TURN_FIELDS}:
            if medium := _unread(name, turn[name], []):
                _refuse(medium, f"{name} of a turn: {_brief(turn[name])}")
        if {"user", "assistant"} <= turn.keys():
            in_pairs = True
            exchange = [("user", turn["user"]), ("assistant", turn["assistant"])]
        else:
            exchange = [_turn(turn, options.image_marker)]
        for role, content in exchange:
            if role == "system" and isinstance(content, str) and not content.strip():
                continue  # LLaVA and ShareGPT store empty system prompts
            text = clean_text(content, "turn", options.max_chars)
            text = mark_images(text, options) if role == "user" else text
            turns.append({"role": role, "content": text})
    body = turns[1:] if turns and turns[0]["role"] == "system" else turns
    roles = [turn["role"] for turn in body]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise Skipped("conversation: turns do not alternate", ", ".join(roles)[:80])
    if len(body) < 2:
        raise Skipped("conversation: no answer")
    turns = turns[:-1] if len(body) % 2 else turns
    questions = [turn for turn in turns if turn["role"] == "user"]
    marks = sum(turn["content"].count(options.image_tag) for turn in questions)
    if in_pairs and not marks:  # data in this form has its images first, without marks
        questions[0]["content"] = f"{options.image_tag}\n" * num_images + questions[0]["content"]
        marks = num_images
    _check_marks(marks, num_images)
    return turns


def _turns(value: Any) -> Any:
    """A list of turns from that list, a struct of lists of their fields, or JSON text of either.

    None stays None.
    """
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise Skipped("conversation: not a list of turns", str(e)) from e
    value = _unstack(value)
    if not (value is None or isinstance(value, list)):
        raise Skipped("conversation: not a list of turns", _brief(value))
    return value


def _images_of_turns(turns: Any, images: list[Any]) -> list[Any]:
    """The images of the record; without any, those that its turns or their parts hold."""
    inside = []
    for turn in turns or ():
        if isinstance(turn, dict):
            parts = turn.get("content")
            for holder in (turn, *(parts if isinstance(parts, list) else ())):
                if isinstance(holder, dict):
                    inside += _listed(holder.get("images") or holder.get("image"))
    if inside and images and inside != images:
        _refuse("image", f"the turns hold {len(inside)} images, the record {len(images)}")
    return images or inside


def _unstack(value: Any) -> Any:
    """Turns a struct of lists, as datasets and tfds store a list of structs, into that list."""
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if any(not isinstance(x, list) or len(x) != len(columns[0]) for x in columns):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _turn(turn: dict[str, Any], marker: str) -> tuple[str, Any]:
    """(our role, content) of one turn."""
    role = turn["from"] if "from" in turn else turn.get("role")
    content = turn["value"] if "value" in turn else turn.get("content")
    if not isinstance(role, str):
        raise Skipped("conversation: turn without role and text", f"keys {sorted(turn)}"[:80])
    role = role.strip().lower()
    name = "user" if role in USER_ROLES else "assistant" if role in ASSISTANT_ROLES else role
    if name not in ("user", "assistant", "system"):
        raise Skipped("conversation: unknown role", role[:40])
    content = _unstack(content)
    if isinstance(content, list):
        content = "".join(_part(part, marker) for part in content)
    return name, content


def _part(part: Any, marker: str) -> str:
    """A part of a content list as text."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type")
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            return part["text"]
        if kind in ("image", "image_url", "input_image"):
            return marker + "\n"
    raise Skipped("conversation: part that is neither text nor image", str(part)[:60])
