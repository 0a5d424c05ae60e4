"""Files of a prepared data set: ArrayRecord shards and the description that tfds reads.

tfds writes a data set in one process; here every shard is a file of its own, written anywhere, and
tfds describes them when all are there. No TensorFlow. ArrayRecord writes and reads local files
only, so those of a bucket are made beside and copied.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax.data.sources import write_whole

NAME = "prepared"
MODULE_NAME = "janusflow_jax.data.prepare_files"
"""Stored in every data set's dataset_info.json, and how a data set is recognized as ours. It is the
module's path of the first release and must never change, wherever the code moves."""
"""Of the data set in its own files."""
_BATCH = 64  # records that are copied at once


def features(kind: str) -> Any:
    """The tfds features of a kind of records (`importers.raw.KINDS`)."""
    import tensorflow_datasets as tfds

    f = tfds.features
    text, image = f.Text(), f.Image(shape=(None, None, 3))
    turns = f.Sequence({"role": f.Text(), "content": f.Text()})
    kinds = {
        "captions": {"image": image, "captions": f.Sequence(f.Text())},
        "conversation": {"images": f.Sequence(image), "conversation": turns},
        "document": {"images": f.Sequence(image), "text": text},
        "text": {"text": text},
    }
    return f.FeaturesDict({"id": f.Text(), **kinds[kind]})


class Serializer:
    """Records -> bytes as tfds reads them."""

    def __init__(self, kind: str):
        from tensorflow_datasets.core import example_serializer

        self._features = features(kind)
        self._bytes = example_serializer.ExampleSerializer(self._features.get_serialized_info())

    def __call__(self, record: dict[str, Any]) -> bytes:
        given = dict(record)  # pictures are handed over as streams: an array would be encoded by TF
        if "image" in given:
            given["image"] = io.BytesIO(given["image"])
        if "images" in given:
            given["images"] = [io.BytesIO(data) for data in given["images"]]
        example = self._bytes.get_tf_example(self._features.encode_example(given))
        # tfds's own call leaves the order of fields to the process's hash seed
        return example.SerializeToString(deterministic=True)


@contextlib.contextmanager
def writer(path: epath.Path) -> Iterator[Any]:
    """An ArrayRecord writer (`.write(bytes)`); the file stands there whole, or not at all."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    is_local = "://" not in str(path)
    folder = os.path.dirname(path) if is_local else None
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    os.close(handle)
    try:
        out = array_record_module.ArrayRecordWriter(part, "group_size:1")
        yield out
        out.close()
        if is_local:
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, path)
        else:
            with open(part, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**24)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def read(path: epath.Path) -> Iterator[bytes]:
    """The records of a file in order. Raises OSError: it is broken or not there."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    with _local(path) as local:
        reader = array_record_module.ArrayRecordReader(local)
        try:
            count = reader.num_records()
            for begin in range(0, count, _BATCH):
                yield from reader.read(list(range(begin, min(begin + _BATCH, count))))
            reader.close()
        except RuntimeError as e:
            raise OSError(f"{path}: {e}") from e


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    if "://" not in str(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, path.name)
        with path.open("rb") as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 2**24)
        yield copy


def merge(parts: Sequence[tuple[str, list[bool]]], target: str) -> None:
    """Writes the kept records of `parts` to one file; does nothing where it stands already.

    Args:
      parts: (file, which of its records are kept).
      target: path of the file.
    Raises:
      OSError: a file does not hold as many records as it should.
    """
    path = epath.Path(target)
    if path.exists():
        return
    if len(parts) == 1 and all(parts[0][1]) and "://" not in target:
        os.replace(parts[0][0], target)
        return
    with writer(path) as out:
        for part, keep in parts:
            found = 0
            for found, record in enumerate(read(epath.Path(part)), 1):
                if found <= len(keep) and keep[found - 1]:
                    out.write(record)
            if found != len(keep):  # array_record counts 0 in a file that is not there
                raise OSError(f"{part}: expected {len(keep)} records; got {found}")


def shard_name(split: str, number: int, count: int) -> str:
    """The file name that tfds expects of a shard."""
    return f"{NAME}-{split}.array_record-{number:05}-of-{count:05}"


def describe(
    out: epath.Path, kind: str, shards: dict[str, list[int]], num_bytes: dict[str, int], text: str
) -> None:
    """Writes features.json and dataset_info.json: from here on the data set is there.

    Args:
      out: the folder.
      kind: of the records.
      shards: split -> records of each of its shards.
      num_bytes: split -> bytes of its records.
      text: the description.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming, splits

    identity = dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(out), module_name=MODULE_NAME
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(kind), description=text)
    info.set_file_format("array_record")
    found = [
        splits.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=num_bytes[split],
            filename_template=naming.ShardedFileTemplate(
                data_dir=out, dataset_name=NAME, split=split, filetype_suffix="array_record"
            ),
        )
        for split, lengths in shards.items()
    ]
    info.set_splits(splits.SplitDict(found))
    info.write_to_directory(out)


def save_arrays(path: epath.Path, **arrays: np.ndarray) -> None:
    """Arrays in one compressed file, whole or not at all."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
    write_whole(path, data.getvalue())


def load_arrays(path: epath.Path, *names: str) -> list[np.ndarray]:
    """Some arrays of such a file."""
    with np.load(io.BytesIO(path.read_bytes())) as stored:
        return [stored[name] for name in names]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
