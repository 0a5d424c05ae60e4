"""Prepared data sets with random access: `open_source(path, split)[i] -> record`.

Any data set that tfds prepared as array_record with the features of `samples.py` will do: image or
images (kept encoded), captions, conversation, text; with other names by `mapped`. No TensorFlow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging
from etils import epath

from janusflow_jax.config.errors import DataError

T = TypeVar("T")

NEEDED = {
    "generate": (("image", "images"), ("captions",)),
    "understand": (("image", "images", "conversation"), ("captions", "conversation", "text")),
    "text": (("text", "captions", "conversation"),),
}
"""Task -> groups of fields; of each group a record needs one."""
FIELDS = ("id", "image", "images", "captions", "conversation", "text")
"""Names that `samples.py` reads: what other names can be mapped to."""
Fields = tuple[tuple[str, str], ...]
"""(our name, the data set's name) each; `captions/text` means `text` inside `captions`."""

RETRY_SECONDS = (0.1, 1.0, 5.0)
"""Waits between attempts at a read that fails; after the last the run stops."""


class TfdsSource:
    """A split of a prepared tfds data set. Records are dicts of str, bytes and list[str]."""

    def __init__(self, path: epath.PathLike, split: str):
        import tensorflow_datasets as tfds

        self.path, self.split = str(path), split
        folder = epath.Path(path)
        scheme = str(folder).partition("://")[0]
        if scheme != str(folder) and scheme != "gs":  # of others array_record reads nothing
            raise DataError(
                f"{folder}: expected a local path or gs:// (all that array_record reads); got "
                f"{scheme}://: mount the store as a folder, or copy the data set"
            )
        if not (folder / "dataset_info.json").exists():
            raise DataError(
                f"{folder}: expected a prepared data set (a folder with dataset_info.json); "
                + ("it has none" if folder.exists() else "the folder does not exist")
                + ": for OpenMoji run `python tools/prepare_openmoji.py --out data/openmoji`, for "
                "your own data tools/prepare_data.py"
            )
        builder: Any = tfds.builder_from_directory(str(folder))
        form = str(getattr(builder.info.file_format, "value", builder.info.file_format))
        if form != "array_record":
            raise DataError(
                f"{folder}: expected files in the format array_record; got {form}: prepare it "
                "again with file_format='array_record'"
            )
        if split not in builder.info.splits:
            raise DataError(
                f"{folder}: expected split one of {sorted(builder.info.splits)}; got {split!r}"
            )

        class KeepEncoded(tfds.decode.SkipDecoding):
            """Also for sequences of images, which tfds can skip in TensorFlow only."""

            def decode_batch_example_np(self, example: Any) -> Any:
                return example

        image = tfds.features.Image
        decoders = {
            name: KeepEncoded()
            for name, feature in builder.info.features.items()
            if isinstance(feature, image) or isinstance(getattr(feature, "feature", None), image)
        }
        self.features = builder.info.features
        self._encoded = frozenset(decoders)
        self._records = builder.as_data_source(split=split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` (0 <= index < len), image still encoded.

        Raises:
          DataError: the store fails again and again (a read is tried four times).
        """
        record = retry(lambda: self._records[index], f"{self.path} {self.split} record {index}")
        return {name: _plain(value, name in self._encoded) for name, value in record.items()}


def open_source(path: epath.PathLike, split: str) -> TfdsSource:
    """Opens a split of a prepared data set.

    Raises:
      DataError: no data set there, or no such split (names the known).
    """
    return TfdsSource(path, split)


class Mapped:
    """A data set under other field names. Fields that are not named stay as they are."""

    def __init__(self, source: TfdsSource, fields: Fields):
        self.path, self.split, self.fields = source.path, source.split, fields
        self._source = source
        self._names = {theirs: _class_names(source.features, theirs) for _, theirs in fields}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        taken = {theirs.split("/")[0] for _, theirs in self.fields}
        out = {name: value for name, value in record.items() if name not in taken}
        for ours, theirs in self.fields:
            value = _inside(record, theirs.split("/"))
            names = self._names[theirs]
            if names is not None:
                value = [names[v] for v in value] if isinstance(value, list) else names[value]
            many = ours in ("captions", "images") and not isinstance(value, list)
            out[ours] = [value] if many else value
        return out


def mapped(source: Any, fields: Fields, task: str) -> Any:
    """The source under our field names, checked to have what the task reads.

    Args:
      source: of `open_source`.
      fields: (ours, theirs) of every field that is called otherwise; () for none.
      task: generate | understand | text.
    Raises:
      DataError: a field that is not there, or one that the task needs (lists all).
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
        elif ours != "conversation" and (wanted := _not_of_kind(feature, ours)):
            problems.append(f"{ours}: expected {theirs!r} to hold {wanted}; it holds {feature}")
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
    return Mapped(source, fields) if fields else source


def _inside(value: Any, path: list[str]) -> Any:
    """What stands at a path; through lists, of each element."""
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


def _not_of_kind(feature: Any, ours: str) -> str:
    """What the field should hold and does not; '' where it does."""
    import tensorflow_datasets as tfds

    if ours in ("image", "images"):
        return "" if isinstance(feature, tfds.features.Image) else "pictures"
    text = isinstance(feature, (tfds.features.Text, tfds.features.ClassLabel))
    number = ours == "id" and getattr(feature, "np_dtype", None) is not None
    return "" if text or number else "text or class names"


def _class_names(features: Any, path: str) -> list[str] | None:
    """Names by number of a field of classes; None of another field."""
    return getattr(_feature(features, path), "names", None)


def retry(read: Callable[[], T], what: str) -> T:
    """Runs `read`; an error of the store is tried again after RETRY_SECONDS, then is a DataError.

    array_record raises RuntimeError for what it cannot open, and for what does not have its hash.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except (OSError, RuntimeError) as e:
            if wait is None:
                raise DataError(
                    f"{what}: cannot be read after {len(RETRY_SECONDS) + 1} attempts ({e}): check "
                    "the disk or the network, or prepare the data set again where a file is "
                    "missing or corrupted; then run the same command again to resume"
                ) from e
            logging.warning("%s: %s; trying again in %s s", what, e, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _plain(value: Any, encoded: bool) -> Any:
    """tfds gives text as bytes and sequences as arrays; we want str and lists.

    Args:
      encoded: bytes are a picture, and stay.
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
