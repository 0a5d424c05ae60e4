"""Prepared data sets with random access: `open_source(path, split)[i] -> record`.

Any data set that tfds prepared as array_record with the features of `samples.py` will do: image or
images (kept encoded), captions, conversation, text. No TensorFlow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging
from etils import epath

T = TypeVar("T")

_ENCODED = ("image", "images")

RETRY_SECONDS = (0.1, 1.0, 5.0)
"""Waits between attempts at a read that fails; after the last the run stops."""


class SourceError(ValueError):
    """A data set that cannot be opened or read; says what was expected and what to do."""


class TfdsSource:
    """A split of a prepared tfds data set. Records are dicts of str, bytes and list[str]."""

    def __init__(self, path: epath.PathLike, split: str):
        import tensorflow_datasets as tfds

        self.path, self.split = str(path), split
        folder = epath.Path(path)
        if not (folder / "dataset_info.json").exists():
            raise SourceError(
                f"{folder}: expected a prepared data set (a folder with dataset_info.json); "
                + ("it has none" if folder.exists() else "the folder does not exist")
                + ": for OpenMoji run `python tools/prepare_openmoji.py --out data/openmoji`"
            )
        builder: Any = tfds.builder_from_directory(str(folder))
        if split not in builder.info.splits:
            raise SourceError(
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
        self._records = builder.as_data_source(split=split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` (0 <= index < len), image still encoded.

        Raises:
          SourceError: the store fails again and again (a read is tried four times).
        """
        record = retry(lambda: self._records[index], f"{self.path} {self.split} record {index}")
        return {name: _plain(value, name in _ENCODED) for name, value in record.items()}


def open_source(path: epath.PathLike, split: str) -> TfdsSource:
    """Opens a split of a prepared data set.

    Raises:
      SourceError: no data set there, or no such split (names the known).
    """
    return TfdsSource(path, split)


def retry(read: Callable[[], T], what: str) -> T:
    """Runs `read`; an error of the store is tried again after RETRY_SECONDS, then is a SourceError.

    array_record raises RuntimeError for what it cannot open, and for what does not have its hash.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except (OSError, RuntimeError) as e:
            if wait is None:
                raise SourceError(
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
