"""Prepared data sets with random access: `open_source(path, split)[i] -> record`.

A data set is a folder that tfds prepared as array_record, with some of the fields that `samples`
reads: image or images (encoded), captions, conversation, text. `mapped` renames other fields.
TensorFlow is not needed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from etils import epath

from janusflow_jax.config import files
from janusflow_jax.config.errors import ConfigError, DataError

T = TypeVar("T")

NEEDED = {
    "generate": (("image", "images"), ("captions",)),
    "understand": (("image", "images", "conversation"), ("captions", "conversation", "text")),
    "text": (("text", "captions", "conversation"),),
}
"""Task -> groups of fields; a record needs one field of each group."""
FIELDS = ("id", "image", "images", "captions", "conversation", "text")
"""The fields that `samples` reads."""
Fields = tuple[tuple[str, str], ...]
"""Pairs (our name, the data set's name); `captions/text` means `text` inside `captions`."""

RETRY_SECONDS = (0.1, 1.0, 5.0)
"""Waits between attempts at a read that fails; after the last the run stops."""
PROBES = 64
"""Records that `digest` reads, spread over the data set."""
UNREADABLE = "store unreadable"
"""`reason` of the DataError that `retry` raises: the store fails, the record may be good."""


class TfdsSource:
    """A split of a prepared tfds data set. Records are dicts of str, bytes and list[str]."""

    def __init__(self, path: epath.PathLike, split: str):
        """Raises DataError: no data set there, or no such split."""
        import tensorflow_datasets as tfds

        self.path, self.split = str(path), split
        self.fields: Fields = ()  # see `mapped`
        folder = files.resolve(path)
        if files.is_remote(folder) and not str(folder).startswith("gs://"):
            raise DataError(
                f"{folder}: expected a local path or a gs:// URL, because array_record reads no "
                "other store: mount the store as a folder, or copy the data set"
            )
        if not (folder / "dataset_info.json").exists():
            raise DataError(
                f"{folder}: expected a prepared data set (a folder with dataset_info.json); "
                + ("it has none" if folder.exists() else "the folder does not exist")
                + ": run `python tools/prepare_openmoji.py --out data/openmoji` for OpenMoji, "
                "tools/prepare_data.py for your own data"
            )
        builder: Any = tfds.builder_from_directory(str(folder))
        form = str(getattr(builder.info.file_format, "value", builder.info.file_format))
        if form != "array_record":
            raise DataError(
                f"{folder}: expected the file format array_record; got {form}: prepare it again "
                "with file_format='array_record'"
            )
        if split not in builder.info.splits:
            raise DataError(
                f"{folder}: expected split one of {sorted(builder.info.splits)}; got {split!r}"
            )

        class KeepEncoded(tfds.decode.SkipDecoding):
            """Leaves sequences of images encoded too, which tfds can do in TensorFlow only."""

            def decode_batch_example_np(self, example: Any) -> Any:
                return example

        image = tfds.features.Image
        decoders = {
            name: KeepEncoded()
            for name, feature in builder.info.features.items()
            if isinstance(feature, image) or isinstance(getattr(feature, "feature", None), image)
        }
        self.features = builder.info.features
        self.num_bytes = builder.info.splits[split].num_bytes
        self._encoded = frozenset(decoders)
        self._records = builder.as_data_source(split=split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` (0 <= index < len), image still encoded.

        Raises:
          DataError: the store fails after every retry.
        """
        record = retry(lambda: self._records[index], f"{self.path} {self.split} record {index}")
        record = {name: _plain(value, name in self._encoded) for name, value in record.items()}
        taken = {theirs.split("/")[0] for _, theirs in self.fields}
        out = {name: value for name, value in record.items() if name not in taken}
        for ours, theirs in self.fields:
            value = _value_at(record, theirs.split("/"))
            names = getattr(_feature(self.features, theirs), "names", None)  # of classes
            if names is not None:
                value = [names[v] for v in value] if isinstance(value, list) else names[value]
            many = ours in ("captions", "images") and not isinstance(value, list)
            out[ours] = [value] if many else value
        return out


open_source = TfdsSource


def digest(records: Any) -> str:
    """SHA-256 of the number of records, their total bytes, and PROBES of the records.

    With the lengths of all records (`packing`), it shows without reading the whole data set that it
    was made anew.
    """
    total = hashlib.sha256(f"{len(records)} {getattr(records, 'num_bytes', 0)}".encode())
    places = np.linspace(0, max(len(records) - 1, 0), min(PROBES, len(records)))
    for i in places.astype(np.int64).tolist():
        # `default` gets encoded images
        text = json.dumps(records[i], sort_keys=True, default=lambda x: bytes(x).hex())
        total.update(text.encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def field_pairs(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Values of --field, OURS=THEIRS, as the `fields` of a source.

    Raises:
      ConfigError: another form.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (ours, _, theirs) in zip(texts, pairs, strict=True):
        if not ours or not theirs:
            raise ConfigError(f"--field: expected OURS=THEIRS, such as image=jpg; got {text!r}")
    return tuple((ours, theirs) for ours, _, theirs in pairs)


def mapped(source: Any, fields: Fields, task: str) -> Any:
    """The source under our field names; checks that it has what the task reads. Other
    fields keep their names.

    Args:
      source: of `open_source`.
      fields: (ours, theirs) of every field with another name; () for none.
      task: generate | understand | text.
    Raises:
      DataError: fields that do not exist, or that the task needs (lists all).
    """
    if not isinstance(source, TfdsSource):
        return source
    problems = []
    for ours, theirs in fields:
        feature = _feature(source.features, theirs)
        if ours not in FIELDS:
            problems.append(f"{ours}: expected one of {list(FIELDS)} in front; got {ours!r}")
        elif feature is None:
            problems.append(f"{ours}: expected a field {theirs!r}; the data set has none")
        elif ours != "conversation" and (expected := _wrong_kind(feature, ours)):
            problems.append(f"{ours}: expected {theirs!r} to hold {expected}; it holds {feature}")
    taken = {theirs.split("/")[0] for _, theirs in fields}
    names = {n for n in source.features if n not in taken} | {ours for ours, _ in fields}
    for group in NEEDED.get(task, ()):
        if not problems and not names & set(group):
            problems.append(f"task {task}: expected a field {' or '.join(group)}")
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        known = ", ".join(sorted(_paths(source.features)))
        raise DataError(
            f"{source.path}: fields (the data set has {known}):\n"
            f"{listed}\nSet the source's `fields`, such as (('captions', 'label'),): ours, theirs"
        )
    if not fields:
        return source
    out = copy.copy(source)
    out.fields = fields
    return out


def _value_at(value: Any, path: list[str]) -> Any:
    """The value at a path; inside a list, that of each element."""
    for name in path:
        value = [v[name] for v in value] if isinstance(value, list) else value[name]
    return value


def _feature(features: Any, path: str) -> Any:
    """The tfds feature at a path, without the sequences around it; None where there is none."""
    for name in path.split("/"):
        features = getattr(features, "feature", features)  # of a sequence
        if not hasattr(features, "items") or name not in dict(features.items()):
            return None
        features = features[name]
    return getattr(features, "feature", features)


def _paths(features: Any, prefix: str = "") -> list[str]:
    out = []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        nested = hasattr(inner, "items")
        out += _paths(inner, f"{prefix}{name}/") if nested else [f"{prefix}{name}"]
    return out


def _wrong_kind(feature: Any, ours: str) -> str:
    """What the field should hold; '' where it does."""
    import tensorflow_datasets as tfds

    if ours in ("image", "images"):
        return "" if isinstance(feature, tfds.features.Image) else "images"
    text = isinstance(feature, (tfds.features.Text, tfds.features.ClassLabel))
    number = ours == "id" and getattr(feature, "np_dtype", None) is not None
    return "" if text or number else "text or class names"


def retry(read: Callable[[], T], what: str) -> T:
    """Runs `read`; retries after RETRY_SECONDS where the store fails.

    Raises:
      DataError: every attempt failed; its `reason` is UNREADABLE.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except (OSError, RuntimeError) as e:  # array_record raises RuntimeError for a missing file
            if wait is None:
                raise DataError(
                    f"{what}: cannot be read after {len(RETRY_SECONDS) + 1} attempts ({e}): check "
                    "the disk or the network, or prepare the data set again if a file is missing "
                    "or corrupted; then run the same command again to resume",
                    UNREADABLE,
                ) from e
            logging.warning("%s: %s; retrying in %s s", what, e, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file that appears complete, or not at all."""
    if files.is_remote(path):  # an object of a bucket appears when it is complete
        path.write_bytes(data)
        return
    part = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    with files.naming(path):
        part.write_bytes(data)
    part.replace(path)


def _plain(value: Any, encoded: bool) -> Any:
    """tfds's bytes of text as str, its arrays as lists.

    Args: encoded: whether bytes are an image and stay bytes.
    """
    if isinstance(value, bytes):
        return value if encoded else value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v, encoded) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v, encoded) for name, v in value.items()}
    return value
