"""Cached latents and SigLIP features of a data set's images: the files, and how they are read.

A cache is a folder of `manifest.json` and ArrayRecord shards:

    latents-00002-of-00040.array_record    mean and log-variance of the VAE's posterior
    features-00002-of-00040.array_record   SigLIP's features of the same pixels

Shard k holds the data set's records [k * shard_records, (k + 1) * shard_records), `crops` entries
each, so the place of an entry (record, crop) follows by arithmetic. An entry holds a CRC of the
image that it was made from, or the reason why there are no values: an image that has changed since,
or that was bad, is a bad record here too. ArrayRecord's own hashes detect damaged shards.

An entry of a `generate` source is a square crop. An entry of an `understand` source is all images
of the record, resized as a whole, features only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from janusflow_jax.config import files
from janusflow_jax.config.errors import DataError
from janusflow_jax.config.fields import differences
from janusflow_jax.data import images, samples, sources

FORMAT = 1
FILE = "manifest.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PROBES = 64
"""Records that the fingerprint reads; every entry is checked against its image anyway."""

_VALUES, _BAD, _SAME = range(3)  # _SAME: as crop 0, because the image is square
_HEAD = struct.Struct("<BxH")  # kind, number of images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache was made from: caches with the same manifest are the same."""

    format: int = FORMAT
    task: str  # generate | understand
    split: str
    records: int
    pictures: str  # `fingerprint` of the data set
    image_size: int
    crops: int  # of each image
    seed: int  # of the crops
    dtype: str  # of the stored values: float32 | bfloat16
    computed_in: str  # dtype of the encoders' activations
    shard_records: int
    vae: str  # digest of its encoder's parameters; '': no latents
    siglip: str  # digest of its parameters; '': no features
    latent_shape: tuple[int, ...]  # h, w, C; (): no latents
    feature_shape: tuple[int, ...]  # S, E; (): no features

    @property
    def num_shards(self) -> int:
        return -(-self.records // self.shard_records)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Kind of shard -> shape of one image's values; latents hold mean and log-variance."""
        out = {"latents": (2, *self.latent_shape)} if self.vae else {}
        return out | ({"features": self.feature_shape} if self.siglip else {})

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one crop, all kinds together."""
        return sum(int(np.prod(s)) for s in self.shapes.values()) * DTYPES[self.dtype].itemsize

    def shard_range(self, k: int) -> range:
        """The records that a shard holds."""
        return range(k * self.shard_records, min((k + 1) * self.shard_records, self.records))

    def shard_path(self, folder: epath.PathLike, kind: str, k: int) -> epath.Path:
        return files.resolve(folder) / f"{kind}-{k:05}-of-{self.num_shards:05}.array_record"


def fingerprint(records: Any) -> str:
    """Digest of a data set's images: how many there are, and the bytes of some of them."""
    digest = hashlib.sha256(str(len(records)).encode())
    for i in np.unique(np.linspace(0, max(len(records) - 1, 0), PROBES).astype(np.int64)).tolist():
        for encoded in samples.images_of(records[i]) if len(records) else ():
            digest.update(hashlib.sha256(encoded).digest())
    return digest.hexdigest()


def crop_key(seed: int, record: int, crop: int) -> tuple[int, ...]:
    """Key of a crop's place in its image, for `images.for_generation`."""
    return (seed, record, crop)


# --- writing


def create(folder: epath.PathLike, manifest: Manifest) -> None:
    """Creates the folder with its manifest; one that exists must be the same cache.

    Raises:
      DataError: it holds another cache (lists every difference).
    """
    folder = files.resolve(folder)
    if (folder / FILE).exists():
        stored = dataclasses.asdict(read_manifest(folder))
        if differ := differences(stored, dataclasses.asdict(manifest)):
            listed = "\n".join(f"  - {d}" for d in differ)
            raise DataError(
                f"{folder}: holds another cache:\n{listed}\nUse another --out, or remove the folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    sources.write_whole(folder / FILE, text.encode())


def is_done(folder: epath.PathLike, manifest: Manifest, k: int) -> bool:
    """Whether a shard is complete: a shard gets its name only when it is."""
    return all(manifest.shard_path(folder, kind, k).exists() for kind in manifest.shapes)


@contextlib.contextmanager
def shard_writers(folder: epath.PathLike, manifest: Manifest, k: int) -> Iterator[dict[str, Any]]:
    """Kind -> writer of shard k. Its files appear complete, or not at all.

    They are written in a temporary folder, then moved into the cache, which may be a bucket.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    folder = files.resolve(folder)
    remote = files.is_remote(folder)
    parent = None if remote else str(folder)
    for left in folder.glob(f".shard-{k:05}-*"):  # by a process that was killed
        left.rmtree()
    with tempfile.TemporaryDirectory(prefix=f".shard-{k:05}-", dir=parent) as work:
        parts = {kind: os.path.join(work, f"{kind}.array_record") for kind in manifest.shapes}
        # The values do not compress. Groups of one make every entry addressable.
        writers = {
            kind: array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
            for kind, file in parts.items()
        }
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()
        for kind, file in parts.items():
            target = manifest.shard_path(folder, kind, k)
            if remote:
                epath.Path(file).copy(target, overwrite=True)
            else:
                os.replace(file, target)


def entry(crcs: Sequence[int], values: Sequence[np.ndarray], dtype: str) -> bytes:
    """The bytes of an entry.

    Args: crcs, values: of each image.
    """
    head = _HEAD.pack(_VALUES, len(crcs)) + np.asarray(crcs, "<u4").tobytes()
    return head + b"".join(np.ascontiguousarray(v, DTYPES[dtype]).tobytes() for v in values)


def bad_entry(reason: str) -> bytes:
    """The bytes of an entry without values, with the reason."""
    return _HEAD.pack(_BAD, 0) + reason.encode()


def reason(data: bytes) -> str:
    """The reason in a `bad_entry`."""
    return data[_HEAD.size :].decode(errors="replace")


def same_entry() -> bytes:
    """The bytes of an entry for a crop that equals crop 0."""
    return _HEAD.pack(_SAME, 0)


# --- reading


class _Shard(NamedTuple):
    """What array_record asks of a file, so that it need not open it to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Raises DataError: there is none, or it is of another version."""
    file = files.resolve(folder) / FILE
    if not file.exists():
        raise DataError(
            f"{folder}: expected a cache (a folder with {FILE}); got none: "
            "tools/cache_latents.py makes one"
        )
    values = json.loads(file.read_text())
    known = {f.name for f in dataclasses.fields(Manifest)}
    if values.get("format") != FORMAT or set(values) != known:
        raise DataError(
            f"{file}: expected format {FORMAT}; got {values.get('format')!r}: made by another "
            "version of janusflow_jax"
        )
    lists = {n: tuple(v) for n, v in values.items() if isinstance(v, list)}
    return Manifest(**values | lists)


class Cache:
    """A finished cache, open for reading."""

    def __init__(self, folder: epath.PathLike):
        """Raises DataError: no cache there, or shards are missing."""
        from array_record.python import array_record_data_source

        folder = files.resolve(folder)
        self.folder = str(folder)
        self.manifest = m = read_manifest(folder)
        names = {p.name for p in folder.iterdir()}
        self._shards = {}
        for kind in m.shapes:
            paths = [m.shard_path(folder, kind, k) for k in range(m.num_shards)]
            missing = [p.name for p in paths if p.name not in names]
            if missing:
                raise DataError(
                    f"{folder}: expected {m.num_shards} shards of {kind}; {len(missing)} are "
                    f"missing, such as {missing[0]}: run tools/cache_latents.py again to resume"
                )
            counts = [len(m.shard_range(k)) * m.crops for k in range(m.num_shards)]
            shards: Any = [_Shard(str(p), 0, n, n) for p, n in zip(paths, counts, strict=True)]
            self._shards[kind] = array_record_data_source.ArrayRecordDataSource(shards)

    def latents(self, record: int, crop: int, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-variance [h, w, C] of a crop of an image.

        Args: encoded: the image's bytes, as the data set has them.
        Raises:
          DataError: the image was bad or has changed, the shard is damaged, or the store cannot be
            read (`sources.UNREADABLE`).
        """
        (both,) = self._values("latents", record, crop, [encoded])
        return both[0], both[1]

    def features(self, record: int, crop: int, encoded: Sequence[bytes]) -> list[np.ndarray]:
        """SigLIP's features [S, E] of each image; raises as `latents` does."""
        return self._values("features", record, crop, encoded)

    def pixels(self, record: int, crop: int, image: Any) -> np.ndarray:
        """The crop itself, uint8[H, H, 3], for what is not cached."""
        m = self.manifest
        return images.for_generation(image, m.image_size, crop_key(m.seed, record, crop))

    def _values(
        self, kind: str, record: int, crop: int, encoded: Sequence[bytes]
    ) -> list[np.ndarray]:
        where = f"cache {self.folder} {kind}"
        data = self._read(kind, record, crop, where)
        what, count = _HEAD.unpack_from(data)
        if what == _SAME:
            return self._values(kind, record, 0, encoded)
        if what == _BAD:
            raise DataError(f"{where}: {reason(data)}")
        crcs = np.frombuffer(data, "<u4", count, _HEAD.size).tolist()
        values = np.frombuffer(data, DTYPES[self.manifest.dtype], offset=_HEAD.size + 4 * count)
        values = values.reshape(count, *self.manifest.shapes[kind])
        if not np.isfinite(values.astype(np.float32)).all():
            raise DataError(
                f"{where} record {record}: expected finite values; got NaN or infinity; make the "
                "cache again, with --compute-dtype float32"
            )
        expected = [zlib.crc32(x) for x in encoded]
        if not set(expected) <= set(crcs):
            raise DataError(f"{where}: is of another image; make the cache again")
        return [values[crcs.index(x)] for x in expected]

    def _read(self, kind: str, record: int, crop: int, where: str) -> bytes:
        index = record * self.manifest.crops + crop

        def read() -> bytes:
            try:
                return self._shards[kind][index]
            except RuntimeError as e:  # the only error that array_record raises
                if "Corrupted" in str(e):
                    raise DataError(f"{where}: damaged: {e}") from e
                raise OSError(str(e)) from e

        return sources.retry(read, f"{where} record {record}")
