"""A bucket under gs:// that is a folder of this machine, with the rules of an object store.

There are no folders, a file appears when it is closed, and nothing can be appended. TensorStore and
array_record open gs:// in C++: they get the folder instead, so their own drivers are not tested.
"""

from __future__ import annotations

import io
import pathlib
from typing import Any

import fsspec
from array_record.python import array_record_module
from etils.epath import backend
from fsspec.registry import _registry
from orbax.checkpoint._src.serialization import tensorstore_utils

from janusflow_jax.config import files

URL = "gs://bucket"


class _Upload(io.BytesIO):
    """Writes its file when it is closed."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self.getvalue())
        super().close()


class Gcs(fsspec.AbstractFileSystem):
    protocol = ("gcs", "gs")
    root = pathlib.Path()
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **options: Any):
        super().__init__(**options)
        type(self).options = options

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("gs://").strip("/")

    def _local(self, path: Any) -> pathlib.Path:
        return self.root / self._strip_protocol(path)

    def info(self, path: Any, **_: Any) -> dict[str, Any]:
        local, name = self._local(path), self._strip_protocol(path)
        if local.is_file():
            return {"name": name, "size": local.stat().st_size, "type": "file"}
        if any(p.is_file() for p in local.rglob("*")):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: Any, detail: bool = True, **_: Any) -> list:
        if self.info(path)["type"] == "file":
            entries = [self.info(path)]
        else:
            names = [f"{self._strip_protocol(path)}/{p.name}" for p in self._local(path).iterdir()]
            entries = [self.info(name) for name in sorted(names) if self.exists(name)]
        return entries if detail else [entry["name"] for entry in entries]

    def mkdir(self, path: Any, create_parents: bool = True, **_: Any) -> None: ...

    def makedirs(self, path: Any, exist_ok: bool = False) -> None: ...

    def rmdir(self, path: Any) -> None: ...

    def rm_file(self, path: Any) -> None:
        if self._local(path).is_file():  # fsspec passes folders too
            self._local(path).unlink()

    _rm = rm_file

    def cp_file(self, path1: Any, path2: Any, **_: Any) -> None:
        if self._local(path1).is_file():
            _Upload(self._local(path2)).write(self._local(path1).read_bytes())

    def _open(self, path: Any, mode: str = "rb", **_: Any) -> Any:
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"{path}: a bucket opens no file with {mode}")
        return self._local(path).open("rb") if mode == "rb" else _Upload(self._local(path))


def install(monkeypatch: Any, root: pathlib.Path) -> pathlib.Path:
    """Makes gs:// the folder `root`; returns the folder of the bucket."""
    normalize = tensorstore_utils._normalize_path
    reader = array_record_module.ArrayRecordReader

    def local(path: Any) -> str:
        return str(path).replace("gs://", f"{root}/")

    monkeypatch.setattr(Gcs, "root", root)
    for protocol in Gcs.protocol:
        monkeypatch.setitem(_registry, protocol, Gcs)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Gcs.clear_instance_cache()
    files._check_opens.cache_clear()
    monkeypatch.setattr(tensorstore_utils, "_normalize_path", lambda path: normalize(local(path)))
    monkeypatch.setattr(
        array_record_module, "ArrayRecordReader", lambda path, *a, **k: reader(local(path), *a, **k)
    )
    return root / "bucket"
