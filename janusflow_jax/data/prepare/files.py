"""The files of a data set: ArrayRecord shards and the description that tfds reads.

tfds itself writes a data set in one process. Here any worker writes any shard, and tfds describes
them when all are there. No TensorFlow. ArrayRecord writes and reads local files only, so the files
of a bucket are written to the local disk and copied.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax.config.files import is_remote
from janusflow_jax.data.sources import write_whole

NAME = "prepared"
"""The name of the data set in its own files."""
MODULE_NAME = "janusflow_jax.data.prepare_files"
"""Stored in every data set's dataset_info.json, and how a data set is recognized as ours. It is the
module's path of the first release and must never change, wherever the code moves."""
_BATCH = 64  # records that are copied at once


def features(kind: str) -> Any:
    """The tfds features of a kind of records (`records.KINDS`)."""
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
        record = dict(record)  # tfds copies a stream as it is; an array it would encode with TF
        if "image" in record:
            record["image"] = io.BytesIO(record["image"])
        if "images" in record:
            record["images"] = [io.BytesIO(data) for data in record["images"]]
        example = self._bytes.get_tf_example(self._features.encode_example(record))
        # tfds's own call lets the hash seed of the process decide the order of fields
        return example.SerializeToString(deterministic=True)


@contextlib.contextmanager
def writer(path: epath.Path) -> Iterator[Any]:
    """An ArrayRecord writer (`.write(bytes)`); the file appears whole or not at all."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    folder = tempfile.gettempdir() if is_remote(path) else os.path.dirname(path)
    part = epath.Path(folder) / f".{path.name}.{uuid.uuid4().hex}"
    try:
        out = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
        yield out
        out.close()
        if is_remote(path):
            _copy(part, path)
        else:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: epath.Path) -> Iterator[bytes]:
    """The records of a file in order. Raises OSError: the file is broken or missing."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    with contextlib.ExitStack() as stack:
        local = path
        if is_remote(path):
            local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
            _copy(path, local)
        reader = array_record_module.ArrayRecordReader(str(local))
        try:
            count = reader.num_records()
            for begin in range(0, count, _BATCH):
                yield from reader.read(list(range(begin, min(begin + _BATCH, count))))
            reader.close()
        except RuntimeError as e:
            raise OSError(f"{path}: {e}") from e


def _copy(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as reader, target.open("wb") as out:
        shutil.copyfileobj(reader, out, 2**24)


def merge(job: tuple[str, Sequence[tuple[str, list[bool]]]]) -> None:
    """Writes one file of the data set from files of shards, unless it is there already.

    Args:
      job: (path of the new file, ((path of a shard's file, which of its records stay), ...)).
    Raises:
      OSError: a file does not hold as many records as it should.
    """
    target, parts = job
    path = epath.Path(target)
    if path.exists():
        return
    if len(parts) == 1 and all(parts[0][1]) and not is_remote(path):
        epath.Path(parts[0][0]).replace(path)
        return
    with writer(path) as out:
        for part, keep in parts:
            count = 0
            for count, record in enumerate(read(epath.Path(part)), 1):
                if count <= len(keep) and keep[count - 1]:
                    out.write(record)
            if count != len(keep):  # array_record reads 0 records from a missing file
                raise OSError(f"{part}: expected {len(keep)} records; got {count}")


def shard_name(split: str, number: int, count: int) -> str:
    """The file name that tfds expects."""
    return f"{NAME}-{split}.array_record-{number:05}-of-{count:05}"


def describe(
    out: epath.Path, kind: str, shards: dict[str, list[int]], num_bytes: dict[str, int], text: str
) -> None:
    """Writes features.json and dataset_info.json, which make the folder a data set.

    Args:
      out: the folder.
      kind: of the records.
      shards: split -> number of records of each shard.
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
    split_infos = [
        splits.SplitInfo(
            name=split,
            shard_lengths=counts,
            num_bytes=num_bytes[split],
            filename_template=naming.ShardedFileTemplate(
                data_dir=out, dataset_name=NAME, split=split, filetype_suffix="array_record"
            ),
        )
        for split, counts in shards.items()
    ]
    info.set_splits(splits.SplitDict(split_infos))
    info.write_to_directory(out)


def save_arrays(path: epath.Path, **arrays: np.ndarray) -> None:
    """Arrays in one compressed file, written whole or not at all."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
    write_whole(path, data.getvalue())


def load_arrays(path: epath.Path, *names: str) -> list[np.ndarray]:
    """Some arrays of such a file."""
    with np.load(io.BytesIO(path.read_bytes())) as stored:
        return [stored[name] for name in names]
