"""Reads the questions of the benchmarks for understanding, in the forms they are published in.

    official form   JSON, with image files in a folder; MME's folders
    TSV             VLMEvalKit's: images in base64, or paths in `image_path`
    Parquet         of the Hugging Face Hub; a file or a folder of them

A benchmark's data are one file, or a folder that has one form.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import string
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import images as images_lib
from janusflow_jax.data.prepare import inputs, parquet
from janusflow_jax.eval.benchmarks.registry import Benchmark

_MAX_INDEX = 64
"""VLMEvalKit's TSV: a shorter `image` is the index of the row that has the image."""
PIXELS = ("published", "vlmevalkit", "own")
_SUFFIXES = (".jpg", ".png")
_SPLITS = {
    "mmbench-dev-en": "dev-",
    "mmmu-val": "validation-",
    "vqav2-val": "validation-",
    "vqav2-testdev": "test-",
}
"""How names of the Hub's Parquet files begin that have the benchmark's split."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParquetImage:
    """An image in a row of a Parquet file."""

    path: epath.Path
    group: int
    row: int  # in the row group
    column: str
    place: int  # among the images of the field

    def read_bytes(self) -> bytes:
        """The image file. Images that follow each other read their row group once.

        Raises: DataError: the file is broken, or not there any more.
        """
        with _GROUP_LOCK:  # many threads read images of one group
            value = _column(self.path, self.group, self.column)[self.row]
        return (value if isinstance(value, list) else [value])[self.place]["bytes"]


_GROUP_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _column(path: epath.Path, group: int, name: str) -> list[Any]:
    with _parquet_errors(path):
        return parquet.column(path, group, name)


ImageSource = bytes | epath.Path | ParquetImage


class ImageKey(str):
    """SHA-256 of an image file: a key of `Data.images`."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    id: str
    text: str
    images: tuple[ImageKey, ...]
    answer: Any = None  # yes or no, a letter, a text, or several texts; None: it is not public
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # letter -> text
    hint: str = ""
    category: str = ""  # POPE: the split; MME: the task; MMMU: the subject
    group: str = ""  # MME: the questions of one pair have the same
    row: int = 0  # of the data, from 0; a row of POPE's TSV has several questions


@dataclasses.dataclass(frozen=True)
class Data:
    """The questions of a benchmark, their images as stored, and what was read.

    `about` has file, rows, sha256, md5, and `known`: the file's name in the registry, '' where it
    is none of the benchmark's files.
    """

    questions: list[Question]
    images: dict[ImageKey, ImageSource]
    about: dict[str, Any]


def read(benchmark: Benchmark, path: Any, images: Any = "", limit: int = 0) -> Data:
    """The questions of a benchmark.

    Args:
      path: the data, see the top of this file.
      images: the folder of image files that the data name; '': the folder of the data.
      limit: only so many questions; 0: all.
    Raises:
      DataError: no such data, data that are not in one of the forms, a question that is there
        twice, or an image that is missing.
    """
    path = files.resolve(path)
    if not path.exists():
        raise DataError(f"--data: expected the data of {benchmark.name}; there is no {path}")
    folder = files.resolve(images) if images else path if path.is_dir() else path.parent
    store = _Images(folder)
    rows, sources = _rows(benchmark.name, path, store)
    about = _about(benchmark, path, sources, len(rows))
    questions = []
    convert = _CONVERTERS[benchmark.name]
    for number, row in enumerate(rows):
        if limit and len(questions) >= limit:
            break
        try:
            questions += [dataclasses.replace(q, row=number) for q in convert(row, store)]
        except (KeyError, ValueError, TypeError, AttributeError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise DataError(f"{path}: row {number}: {error}") from error
            raise DataError(
                f"{path}: row {number}: expected the columns of {benchmark.name}; got {error!r}: "
                "check that it is this benchmark's file"
            ) from error
    questions = questions[:limit] if limit else questions
    if not questions:
        raise DataError(f"{path}: expected questions of {benchmark.name}; got none")
    twice = [key for key, n in Counter(q.id for q in questions).items() if n > 1]
    if twice:
        raise DataError(
            f"{path}: expected each question once; got {twice[0]!r} more than once "
            f"({len(twice)} such ids): use the original file"
        )
    return Data(questions, store.sources, about)


def pixels(source: ImageSource, form: str = "published") -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image as stored.

    Args:
      form: 'published': PIL's `convert("RGB")`, as in the published code, so alpha is dropped and
        EXIF's orientation ignored; 'vlmevalkit': as 'published' of a JPEG copy of PIL's default
        quality, which VLMEvalKit makes of every image in a TSV file; 'own': as everywhere else in
        this project (`data/images.py`).
    Raises:
      DataError: not an image.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    if form == "own":
        return images_lib.decode(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if form == "vlmevalkit":
                copy = io.BytesIO()
                image.convert("RGB").save(copy, "JPEG")
                return np.asarray(Image.open(copy))
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error
        name = "" if isinstance(source, bytes) else f"{source}: "
        raise DataError(f"{name}expected an image; got {len(data)} bytes: {error}") from error


class _Images:
    """Images by the SHA-256 of their files. Those in a folder stay there."""

    def __init__(self, folder: epath.Path) -> None:
        self.folder = folder
        self.sources: dict[ImageKey, ImageSource] = {}
        self._files: dict[str, ImageKey] = {}

    def of(self, value: Any) -> tuple[ImageKey, ...]:
        """Images of a field: bytes, {'bytes', 'path'}, a path in the folder, or a list of these."""
        if isinstance(value, (list, tuple)):
            return tuple(key for x in value for key in self.of(x))
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            return ()
        if isinstance(value, ImageKey):
            return (value,)
        return (self.add(value, value) if isinstance(value, bytes) else self._file(str(value)),)

    def add(self, data: bytes, source: ImageSource) -> ImageKey:
        key = ImageKey(hashlib.sha256(data).hexdigest())
        self.sources.setdefault(key, source)
        return key

    def _file(self, name: str) -> ImageKey:
        if name not in self._files:
            file = self.folder / name
            if not file.exists():
                raise DataError(
                    f"expected the image {file}; it is missing: name the folder of the images with "
                    "--images"
                )
            self._files[name] = self.add(file.read_bytes(), file)
        return self._files[name]


# --- which file it is


def _about(
    benchmark: Benchmark, path: epath.Path, sources: Sequence[epath.Path], rows: int
) -> dict[str, Any]:
    sha256, md5 = hashlib.sha256(), hashlib.md5()
    for source in sources:
        with source.open("rb") as file:
            while piece := file.read(1 << 22):
                sha256.update(piece)
                md5.update(piece)
    digests = {f"sha256:{sha256.hexdigest()}", f"md5:{md5.hexdigest()}"}
    names = {path.name, *(x.name for x in sources)}
    names |= {"parquet"} if sources[0].suffix == ".parquet" else set()

    same = [file.name for file in benchmark.files if file.digest in digests]
    named = [file for file in benchmark.files if file.name in names and not file.digest]
    if named and (0 in [x.rows for x in named] or sum(x.rows for x in named) == rows):
        same += [x.name for x in named]
    return {
        "file": path.name,
        "rows": rows,
        "sha256": sha256.hexdigest(),
        "md5": md5.hexdigest(),
        "known": " ".join(same),
    }


# --- rows of each form


def _rows(name: str, path: epath.Path, store: _Images) -> tuple[list[Row], list[epath.Path]]:
    """Rows as stored, and the files that were read."""
    if path.is_dir():
        tables = _below(path, ".parquet")
        own = [x for x in tables if x.name.startswith(_SPLITS.get(name, ""))]
        tables = own or tables
        tsv = sorted(path.glob("*.tsv"), key=str)
        if name == "mme" and not tables and not tsv:
            return _mme_folders(path)
        sources = tables or tsv or _json_files(name, path)
        if not tables and len(tsv) > 1:
            raise DataError(f"{path}: expected one .tsv file; got {len(tsv)}: name one")
    else:
        sources = [path]
    if not sources:
        raise DataError(f"{path}: expected .tsv, .parquet or .json files of {name}; got none")
    suffix = sources[0].suffix
    if suffix == ".tsv":
        return list(_tsv_rows(sources[0])), sources
    if suffix == ".parquet":
        return _parquet_rows(name, sources, store), sources
    if suffix in (".json", ".jsonl"):
        return _JSON_ROWS[name](sources) if name in _JSON_ROWS else _no_json(name, path), sources
    raise DataError(f"{path}: expected a .tsv, .parquet or .json file; got {path.name}")


def _no_json(name: str, path: epath.Path) -> list[Row]:
    raise DataError(f"{path}: expected a .tsv or .parquet file of {name}; got JSON")


def _below(path: epath.Path, suffix: str) -> list[epath.Path]:
    """Files in a folder and below it."""
    return [file for file, name in inputs.walk(path) if name.endswith(suffix)]


def _json_files(name: str, path: epath.Path) -> list[epath.Path]:
    """The files of the official form in a folder."""
    if name.startswith("vqav2"):
        return sorted(path.glob("*questions.json"), key=str) + sorted(
            path.glob("*annotations.json"), key=str
        )
    return sorted([*path.glob("*.json"), *path.glob("*.jsonl")], key=str)


def tsv(path: epath.Path, *needed: str) -> list[Row]:
    """Rows of a TSV file that VLMEvalKit has written, as they are.

    Raises:
      DataError: a column of `needed` that is not there, or a row without all columns.
    """
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(path.open("rb"), "utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        names = reader.fieldnames or ()
        for name in needed:
            if name not in names:
                raise DataError(
                    f"{path}: expected a TSV file with the column {name}; got {list(names)[:5]}: "
                    "use VLMEvalKit's file"
                )
        rows = []
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                count = sum(value is not None for value in row.values())
                raise DataError(
                    f"{path}: row {number}: expected {len(names)} columns; got {count}: the file "
                    "is truncated: get it again"
                )
            rows.append(row)
    return rows


def _tsv_rows(path: epath.Path) -> Iterator[Row]:
    """Rows of a TSV file of VLMEvalKit, with its images as bytes in `image`.

    Raises:
      DataError: a row without all columns, an image that is not base64, or none of that index.
    """
    rows = tsv(path, "index")
    by_index = {row["index"]: row.get("image", "") for row in rows}
    decoded: dict[str, Any] = {}
    for number, row in enumerate(rows):
        text = row.get("image", "")
        if text and len(text) <= _MAX_INDEX:
            text = by_index.get(text, "")
            if len(text) <= _MAX_INDEX:
                raise DataError(
                    f"{path}: row {number}: expected an image, or the index of a row that has one; "
                    f"got {row['image']!r}: download the file again"
                )
        if text:
            if text not in decoded:
                decoded[text] = _from_base64(f"{path}: row {number}", text)
            row["image"] = decoded[text]
        else:
            row["image"] = _listed(row.get("image_path", ""))
        yield row


def _from_base64(where: str, text: str) -> list[bytes]:
    try:
        return [base64.b64decode(x, validate=True) for x in _listed(text)]
    except binascii.Error as error:
        raise DataError(
            f"{where}: expected an image in base64; {error}: the file is truncated: download it "
            "again"
        ) from error


def _listed(text: str) -> list[str]:
    """A text, or the texts of a list that is written as one."""
    if text.startswith("["):
        return [str(x) for x in ast.literal_eval(text)]
    return [text] if text else []


def _parquet_rows(name: str, sources: Sequence[epath.Path], store: _Images) -> list[Row]:
    """Rows of Parquet files, with keys of their images, which stay in the files.

    GQA's images are rows of other files.
    """
    rows: list[Row] = []
    for source in sources:
        with _parquet_errors(source):
            for group, number, row in parquet.all_columns(source):
                rows.append(_interned(row, store, source, group, number))
    if name == "gqa":
        by_id = {row["id"]: row["image"] for row in rows if "imageId" not in row}
        rows = [row for row in rows if "imageId" in row]
        for row in rows:
            if not row.get("image"):
                row["image"] = by_id.get(row["imageId"], f"{row['imageId']}.jpg")
    if name == "mmmu-val":
        rows = [row for row in rows if str(row["id"]).startswith("validation_")]
    if name == "seed-image":
        rows = [row for row in rows if row.get("data_type", "image") == "image"]
    return rows


@contextlib.contextmanager
def _parquet_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except inputs.Skipped as error:
        raise DataError(f"{path}: expected a Parquet file; {error}: download it again") from error


def _interned(row: Row, store: _Images, path: epath.Path, group: int, number: int) -> Row:
    """The row with keys in place of images."""
    out = dict(row)
    for name, value in row.items():
        every = value if isinstance(value, list) else [value]
        if all(isinstance(x, dict) and x.get("bytes") for x in every) and every:
            out[name] = [
                store.add(x["bytes"], ParquetImage(path, group, number, name, place))
                for place, x in enumerate(every)
            ]
    return out


def _load(path: epath.Path) -> Any:
    data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        hint = files.LFS_HELP if data.startswith(files.LFS_POINTER) else error
        raise DataError(f"{path}: expected a JSON file; {hint}: download it again") from error


def _pope_json(sources: Sequence[epath.Path]) -> list[Row]:
    """POPE's JSON lines; the split is in the name of the file."""
    rows = []
    for source in sources:
        split = source.stem.rsplit("_", 1)[-1]
        for number, line in enumerate(files.read_lines(source)):
            try:
                rows.append({**json.loads(line), "category": split})
            except ValueError as error:
                raise DataError(
                    f"{source}: row {number}: expected a line of JSON; {error}: the file is "
                    "truncated: download it again"
                ) from error
    return rows


def _seed_json(sources: Sequence[epath.Path]) -> list[Row]:
    rows = _load(sources[0])["questions"]
    return [{**x, "image": x["data_id"]} for x in rows if x.get("data_type", "image") == "image"]


def _vqa_json(sources: Sequence[epath.Path]) -> list[Row]:
    """Questions, with the answers of an annotations file if there is one."""
    if not sources[0].name.endswith("questions.json") or len(sources) > 2:
        raise DataError(
            f"{sources[0].parent}: expected one file of questions and at most one of annotations; "
            f"got {[x.name for x in sources]}: put them into a folder of their own"
        )
    asked = _load(sources[0])
    annotations = _load(sources[1])["annotations"] if sources[1:] else []
    answers = {x["question_id"]: x for x in annotations}
    name = f"COCO_{asked['data_subtype']}_{{:012d}}.jpg"
    return [
        {**answers.get(x["question_id"], {}), **x, "image": name.format(x["image_id"])}
        for x in asked["questions"]
    ]


def _keyed_json(sources: Sequence[epath.Path]) -> list[Row]:
    """A JSON object of rows, as GQA's and MM-Vet's."""
    return [{"id": key, **row} for key, row in _load(sources[0]).items()]


_JSON_ROWS: dict[str, Callable[[Sequence[epath.Path]], list[Row]]] = {
    "pope": _pope_json,
    "seed-image": _seed_json,
    "vqav2-val": _vqa_json,
    "vqav2-testdev": _vqa_json,
    "gqa": _keyed_json,
    "mmvet": _keyed_json,
}


def _mme_folders(path: epath.Path) -> tuple[list[Row], list[epath.Path]]:
    """MME's release: a folder a task, with an image and a .txt of two lines for each pair."""
    rows, sources = [], _below(path, ".txt")
    for text in sources:
        task = text.relative_to(path).parts[0]
        beside = [d / f"{text.stem}{suffix}" for d in _mme_images(text) for suffix in _SUFFIXES]
        images = [file for file in beside if file.exists()]
        for number, line in enumerate(files.read_lines(text)):
            question, _, answer = line.rpartition("\t")
            if not question or not images:
                raise DataError(
                    f"{text}: expected lines of `question<TAB>answer` and an image beside it; got "
                    f"{line[:80]!r} and {len(images)} images: use the release as it is"
                )
            pair = f"{task}/{text.stem}"
            row = {"question": question, "answer": answer, "category": task, "pair": pair}
            rows.append({**row, "index": f"{pair}/{number}", "image": str(images[0])})
    return rows, sources


def _mme_images(text: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Where the image of a text file may be: beside it, or in a folder of its own."""
    return text.parent, text.parent.parent / "images"


# --- rows -> questions


def _pope(row: Row, store: _Images) -> list[Question]:
    """One question for each split of a row: the TSV has one row for all splits that ask it."""
    text, answer = row.get("text") or row["question"], _yes_no(row.get("label") or row["answer"])
    key = str(row.get("index") or row.get("id") or row["question_id"])
    splits = str(row["category"]).split(",")
    images = store.of(row["image"])
    return [Question(f"{split}/{key}", text, images, answer, category=split) for split in splits]


def _yes_no(answer: str) -> str:
    if answer.strip().lower() not in ("yes", "no"):
        raise DataError(f"expected the answer yes or no; got {answer!r}: use the benchmark's file")
    return answer.strip().lower()


def _mme(row: Row, store: _Images) -> list[Question]:
    images, text = store.of(row["image"]), row["question"]
    # On the Hub the two questions of an image have one id.
    key = str(row["index"] if "index" in row else f"{row['question_id']}/{text}")
    pair = row.get("pair") or row.get("question_id") or row.get("image_path") or images[0]
    answer, task = _yes_no(row["answer"]), row["category"]
    return [Question(key, text, images, answer, category=task, group=str(pair))]


def _options(row: Row) -> dict[str, str]:
    named = {x: row[x] for x in string.ascii_uppercase if row.get(x) not in (None, "", "nan")}
    listed = {x.upper(): row[f"choice_{x}"] for x in "abcd" if row.get(f"choice_{x}")}
    return {letter: str(text) for letter, text in (named or listed).items()}


def _choice(row: Row, store: _Images) -> list[Question]:
    """A row of MMBench or SEED-Bench."""
    key = row["index"] if "index" in row else row["question_id"]
    options, answer = _options(row), row.get("answer")
    if answer not in options:
        raise DataError(
            f"expected a letter of {list(options)} as answer; got {answer!r}: use the split whose "
            "answers are public (MMBench: dev)"
        )
    hint = row.get("hint")
    return [
        Question(
            str(key),
            row["question"],
            store.of(row["image"]),
            answer,
            options,
            "" if hint in (None, "nan") else hint,
            str(row.get("category") or row.get("question_type_id") or ""),
        )
    ]


def _vqa(row: Row, store: _Images) -> list[Question]:
    golds = tuple(x["answer"] for x in row.get("answers") or ()) or None
    kind = row.get("answer_type") or ""
    key = str(row["question_id"])
    return [Question(key, row["question"], store.of(row["image"]), golds, category=kind)]


def _vqa_val(row: Row, store: _Images) -> list[Question]:
    questions = _vqa(row, store)
    if not questions[0].answer:
        raise DataError(
            "expected ten answers; got none: name the folder that has the file of annotations too, "
            "or use vqav2-testdev"
        )
    return questions


def _gqa(row: Row, store: _Images) -> list[Question]:
    key = str(row["index"] if "index" in row else row["id"])
    image = row["image"] if row.get("image") else f"{row['imageId']}.jpg"
    return [Question(key, row["question"], store.of(image), row["answer"])]


def _mmmu(row: Row, store: _Images) -> list[Question]:
    key = str(row.get("id") or row["index"])
    if str(row.get("split", "validation")) not in ("validation", "val") or key.startswith("dev_"):
        return []
    options = _options(row)
    if "options" in row:  # on the Hub, a list that is written as a string
        options = dict(zip(string.ascii_uppercase, ast.literal_eval(row["options"]), strict=False))
    images = row.get("image") or [row.get(f"image_{n}") for n in range(1, 8)]
    answer: Any = row["answer"]
    if not options and answer.startswith("["):
        answer = tuple(map(str, ast.literal_eval(answer)))
    subject = row.get("category") or key.removeprefix("validation_").rsplit("_", 1)[0]
    return [
        Question(key, row["question"], store.of(images), answer, options, category=str(subject))
    ]


def _mmvet(row: Row, store: _Images) -> list[Question]:
    key = str(row.get("question_id") or row.get("id") or f"v1_{row['index']}")
    image = row["image"] if row.get("image") else row["imagename"]
    return [Question(key, row["question"], store.of(image), row.get("answer"))]


_CONVERTERS: dict[str, Callable[[Row, _Images], list[Question]]] = {
    "pope": _pope,
    "mme": _mme,
    "mmbench-dev-en": _choice,
    "seed-image": _choice,
    "vqav2-val": _vqa_val,
    "vqav2-testdev": _vqa,
    "gqa": _gqa,
    "mmmu-val": _mmmu,
    "mmvet": _mmvet,
}
