"""Cached latents and SigLIP features of a data set's pictures: their form on disk, and reading.

A cache is a folder of `manifest.json` and ArrayRecord shards:

    latents-00002-of-00040.array_record    mean and log-variance of the VAE's posterior
    features-00002-of-00040.array_record   SigLIP's features of the same pixels

Shard k holds the data set's records [k * shard_records, (k + 1) * shard_records), `crops` entries
each, so entry (record, crop) is found by arithmetic. An entry says which picture it was made from
(a CRC of its bytes), or why there is none: a picture that was changed or was bad is a bad record
here too. ArrayRecord's own hashes find damaged shards.

Of a `generate` source an entry is a square crop; of an `understand` source all pictures of the
record, letterboxed, features only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from janusflow_jax.config.errors import DataError
from janusflow_jax.data import images, samples, sources

FORMAT = 1
FILE = "manifest.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PROBES = 64
"""So many records tell data sets apart; each entry is checked against its picture anyway."""

_VALUES, _BAD, _SAME = range(3)  # _SAME: as crop 0, because the picture is square
_HEAD = struct.Struct("<BxH")  # kind, how many pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache was made from; two caches with the same manifest are the same."""

    format: int = FORMAT
    task: str  # generate | understand
    split: str
    records: int
    pictures: str  # `fingerprint` of the data set
    image_size: int
    crops: int  # of each picture
    seed: int  # of the crops
    dtype: str  # of what is stored: float32 | bfloat16
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
        """Kind of shard -> shape of one picture's values: latents hold mean and log-variance."""
        out = {"latents": (2, *self.latent_shape)} if self.vae else {}
        return out | ({"features": self.feature_shape} if self.siglip else {})

    @property
    def bytes_per_entry(self) -> int:
        """Of one crop, all kinds together."""
        return sum(int(np.prod(s)) for s in self.shapes.values()) * DTYPES[self.dtype].itemsize

    def shard_range(self, k: int) -> range:
        """The records that a shard holds."""
        return range(k * self.shard_records, min((k + 1) * self.shard_records, self.records))

    def shard_path(self, folder: epath.PathLike, kind: str, k: int) -> epath.Path:
        return epath.Path(folder) / f"{kind}-{k:05}-of-{self.num_shards:05}.array_record"


def fingerprint(records: Any) -> str:
    """What tells a data set's pictures from another's: how many, and the bytes of some of them."""
    digest = hashlib.sha256(str(len(records)).encode())
    for i in np.unique(np.linspace(0, max(len(records) - 1, 0), PROBES).astype(np.int64)).tolist():
        for encoded in samples.images_of(records[i]) if len(records) else ():
            digest.update(hashlib.sha256(encoded).digest())
    return digest.hexdigest()


def crop_key(seed: int, record: int, crop: int) -> tuple[int, ...]:
    """Key of a crop's place in its picture, for `images.for_generation`."""
    return (seed, record, crop)


# --- writing


def start(folder: epath.PathLike, manifest: Manifest) -> None:
    """Makes the folder, or checks that the one that is there is the same cache.

    Raises:
      DataError: it holds another (lists every difference).
    """
    folder = epath.Path(folder)
    if (folder / FILE).exists():
        there, now = read_manifest(folder), dataclasses.asdict(manifest)
        differ = [
            f"{n}: {v!r} there, {now[n]!r} now"
            for n, v in dataclasses.asdict(there).items()
            if v != now[n]
        ]
        if differ:
            listed = "\n".join(f"  - {d}" for d in differ)
            raise DataError(
                f"{folder}: holds another cache:\n{listed}\nUse another --out, or remove the folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE}.{uuid.uuid4().hex}"
    part.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
    part.replace(folder / FILE)


def is_done(folder: epath.PathLike, manifest: Manifest, k: int) -> bool:
    """Whether a shard is whole: shards appear under their names only when they are."""
    return all(manifest.shard_path(folder, kind, k).exists() for kind in manifest.shapes)


@contextlib.contextmanager
def shard_writers(folder: epath.PathLike, manifest: Manifest, k: int) -> Iterator[dict[str, Any]]:
    """Kind -> writer of shard k; whole or not at all.

    They are written on a local disk, then moved: to a folder beside the cache, or to a bucket.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    remote = "://" in str(folder)
    where = None if remote else str(folder)
    for left in epath.Path(folder).glob(f".shard-{k:05}-*"):  # by one that was killed
        left.rmtree()
    with tempfile.TemporaryDirectory(prefix=f".shard-{k:05}-", dir=where) as work:
        files = {kind: os.path.join(work, f"{kind}.array_record") for kind in manifest.shapes}
        # what encoders give does not compress; a group of one makes every entry reachable
        writers = {
            kind: array_record_module.ArrayRecordWriter(file, "group_size:1,uncompressed")
            for kind, file in files.items()
        }
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()
        for kind, file in files.items():
            target = manifest.shard_path(folder, kind, k)
            if remote:
                epath.Path(file).copy(target, overwrite=True)
            else:
                os.replace(file, target)


def entry(crcs: Sequence[int], values: Sequence[np.ndarray], dtype: str) -> bytes:
    """Values of an entry's pictures (one each), with the CRCs of the pictures."""
    head = _HEAD.pack(_VALUES, len(crcs)) + np.asarray(crcs, "<u4").tobytes()
    return head + b"".join(np.ascontiguousarray(v, DTYPES[dtype]).tobytes() for v in values)


def bad_entry(reason: str) -> bytes:
    """In place of values: why the record has none."""
    return _HEAD.pack(_BAD, 0) + reason.encode()


def reason(data: bytes) -> str:
    """Why a `bad_entry` is one."""
    return data[_HEAD.size :].decode(errors="replace")


def same_entry() -> bytes:
    """In place of a crop that is crop 0 again."""
    return _HEAD.pack(_SAME, 0)


# --- reading


class _Shard(NamedTuple):
    """A file with a known number of records; array_record then need not open it to count."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Raises DataError: none there, or of another version."""
    file = epath.Path(folder) / FILE
    if not file.exists():
        raise DataError(
            f"{folder}: expected a cache (a folder with {FILE}); found none: "
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
        """Raises DataError: no cache there, or shards are missing (says which command goes on)."""
        from array_record.python import array_record_data_source

        self.folder = str(folder)
        self.manifest = m = read_manifest(folder)
        there = {p.name for p in epath.Path(folder).iterdir()}
        self._shards = {}
        for kind in m.shapes:
            paths = [m.shard_path(folder, kind, k) for k in range(m.num_shards)]
            missing = [p.name for p in paths if p.name not in there]
            if missing:
                raise DataError(
                    f"{folder}: expected {m.num_shards} shards of {kind}; {len(missing)} are not "
                    f"there yet, such as {missing[0]}: run tools/cache_latents.py again to go on"
                )
            counts = [len(m.shard_range(k)) * m.crops for k in range(m.num_shards)]
            shards: Any = [_Shard(str(p), 0, n, n) for p, n in zip(paths, counts, strict=True)]
            self._shards[kind] = array_record_data_source.ArrayRecordDataSource(shards)

    def latents(self, record: int, crop: int, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-variance [h, w, C] of a crop of a picture.

        Args: encoded: the picture's bytes, as the data set has them.
        Raises:
          DataError: the picture was bad, is another now, or the shard is damaged.
          DataError: the store cannot be read.
        """
        (both,) = self._values("latents", record, crop, [encoded])
        return both[0], both[1]

    def features(self, record: int, crop: int, encoded: Sequence[bytes]) -> list[np.ndarray]:
        """SigLIP's features [S, E] of each picture; raises as `latents` does."""
        return self._values("features", record, crop, encoded)

    def pixels(self, record: int, crop: int, picture: Any) -> np.ndarray:
        """The crop itself, uint8[H, H, 3], for what is not cached."""
        m = self.manifest
        return images.for_generation(picture, m.image_size, crop_key(m.seed, record, crop))

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
        wanted = [zlib.crc32(x) for x in encoded]
        if not set(wanted) <= set(crcs):
            raise DataError(f"{where}: is of another picture; make the cache again")
        return [values[crcs.index(x)] for x in wanted]

    def _read(self, kind: str, record: int, crop: int, where: str) -> bytes:
        index = record * self.manifest.crops + crop

        def read() -> bytes:
            try:
                return self._shards[kind][index]
            except RuntimeError as e:  # array_record has no other error
                if "Corrupted" in str(e):
                    raise DataError(f"{where}: damaged: {e}") from e
                raise OSError(str(e)) from e

        return sources.retry(read, f"{where} record {record}")
