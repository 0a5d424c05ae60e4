"""Safetensors files: folders of them read lazily, one tensor at a time, and written in a stream.

The format is a length (8 bytes), a JSON header and the bytes of the tensors. It is read by hand and
not mapped into memory, so that a tensor costs its own bytes and no more, wherever the file lies.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
SINGLE = ("model", "diffusion_pytorch_model", "open_clip_model")
"""Names of the weights in the folders that people publish, without their endings."""
SHARD_BYTES = 5_000_000_000


class LazyTensor(NamedTuple):
    """A tensor in a file: `np.asarray` reads it."""

    file: epath.Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        out = np.empty(math.prod(self.shape) * self.dtype.itemsize, np.uint8)
        with self.file.open("rb") as f:
            f.seek(self.start)
            done = 0
            while done < len(out):
                count = _read_into(f, out[done : done + (1 << 24)])
                if not count:
                    raise OSError(f"{self.file}: ended early; was it changed meanwhile?")
                done += count
        array = out.view(self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype)


def _read_into(file: Any, out: np.ndarray) -> int:
    """Fills bytes from a file, in place where the file can; returns how many came."""
    if hasattr(file, "readinto"):
        return file.readinto(out.data)
    piece = file.read(len(out))
    out[: len(piece)] = np.frombuffer(piece, np.uint8)
    return len(piece)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    names = [name for name, _ in pairs]
    seen = dict(pairs)
    if len(seen) < len(names):
        raise ValueError(f"duplicate: {sorted({n for n in names if names.count(n) > 1})}")
    return seen


def read_header(path: epath.Path) -> dict[str, LazyTensor]:
    """The tensors of one file.

    Raises:
      ValueError: the file is damaged or of another kind; the message begins with its path.
    """
    size = path.stat().length
    with path.open("rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(
                f"{path}: a Git LFS pointer, not the weights themselves; run 'git lfs pull'"
            )
        if size < 8 or not 2 <= length <= size - 8:
            what = "empty" if size == 0 else "truncated, or no safetensors file"
            raise ValueError(f"{path}: {what} ({size} bytes); get it again")
        try:
            header = json.loads(f.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            entries = {n: _entry(path, 8 + length, x) for n, x in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its header is damaged ({error}); get it again") from error
    end = 8 + length
    for tensor in sorted(entries.values(), key=lambda x: (x.start, math.prod(x.shape))):
        if tensor.start != end:
            raise ValueError(f"{path}: its header is damaged (gaps or overlaps); get it again")
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
    if end != size:
        raise ValueError(f"{path}: truncated or damaged: expected {end} bytes; got {size}")
    return entries


def _entry(path: epath.Path, base: int, value: Any) -> LazyTensor:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"unknown type {value['dtype']}")
    dtype, shape = np.dtype(DTYPES[value["dtype"]]), tuple(int(n) for n in value["shape"])
    begin, end = value["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's bytes do not match its shape")
    return LazyTensor(path, base + begin, shape, dtype)


class Folder(NamedTuple):
    """A folder's tensors; problems: why it is not to be used; ignored: weights not read."""

    tensors: dict[str, LazyTensor]
    files: list[epath.Path]
    problems: list[str]
    ignored: list[str]


def open_folder(folder: epath.Path, names: Sequence[str] = SINGLE) -> Folder:
    """Reads the headers of a folder's weights, in one file or in shards with an index.

    Args: names: what the weights may be called, without their ending; the first there counts.
    """
    if not folder.is_dir():
        return Folder({}, [], [f"{folder}: no such folder"], [])
    entries = {p.name: p for p in folder.iterdir() if p.is_file()}
    problems: list[str] = []
    files: list[epath.Path] = []
    index: dict[str, str] | None = None
    for name in names:
        if f"{name}.safetensors" in entries:
            files = [entries[f"{name}.safetensors"]]
            break
        if f"{name}.safetensors.index.json" in entries:
            path = entries[f"{name}.safetensors.index.json"]
            index = _read_index(path, problems)
            listed = sorted(set((index or {}).values()))
            lost = [n for n in listed if n not in entries]
            problems += [f"{folder / n}: missing; {path.name} names it" for n in lost]
            files = [entries[n] for n in listed if n in entries]
            break
    weights = [n for n in sorted(entries) if n.endswith((".safetensors", ".bin", ".pt", ".ckpt"))]
    ignored = [n for n in weights if entries[n] not in files]
    if not files and not problems:
        problems.append(_nothing(folder, entries, ignored, names))
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        try:
            here = read_header(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        problems += [
            f"duplicate: {n} is in {tensors[n].file.name} and in {path.name}"
            for n in sorted(here.keys() & tensors)
        ]
        if index is not None:
            problems += [f"{path}: {n} is not in the index" for n in here if n not in index]
        tensors |= {n: x for n, x in here.items() if n not in tensors}
    for name, file in (index or {}).items():
        if file in entries and name in tensors and tensors[name].file.name != file:
            problems.append(f"{name}: the index says {file}; it is in {tensors[name].file.name}")
        elif file in entries and name not in tensors:
            problems.append(f"missing: {name}, which the index places in {file}")
    return Folder(tensors, files, problems, ignored)


def _read_index(path: epath.Path, problems: list[str]) -> dict[str, str] | None:
    try:
        index = json.loads(path.read_text(), object_pairs_hook=_unique)["weight_map"]
        if not index or any(not isinstance(x, str) or "/" in x for x in index.values()):
            raise ValueError("weight_map: expected names of files")
        return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: expected an index with a weight_map; {error!r}")
        return None


def _nothing(
    folder: epath.Path, entries: Mapping[str, Any], weights: list[str], names: Sequence[str]
) -> str:
    expected = " or ".join(f"{n}.safetensors" for n in names)
    pickled = [n for n in weights if n.endswith((".bin", ".pt", ".ckpt"))]
    if pickled:
        where, name = folder / pickled[0], folder / f"{names[0]}.safetensors"
        return (
            f"{folder}: only {', '.join(pickled)}, which can hold programs and is not read; "
            'convert it where torch is installed: python -c "import torch; from safetensors.torch '
            f"import save_file; x = torch.load('{where}', weights_only=True); "
            f"x = x.get('state_dict', x); save_file({{k: v.clone().contiguous() for k, v in "
            f"x.items()}}, '{name}')\""
        )
    found = ", ".join(sorted(entries)[:8]) or "nothing: the folder is empty"
    return f"{folder}: expected {expected} (or shards with {names[0]}.safetensors.index.json); " + (
        f"found {found}"
    )


class Made(NamedTuple):
    """A tensor to be written; `make` is called when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(out: Any, tensors: Mapping[str, Made]) -> None:
    """Writes one file, tensor by tensor; `out` is open for writing bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, x in tensors.items():
        offsets = [at, at + x.nbytes]
        header[name] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        at += x.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name, x in tensors.items():
        array = np.ascontiguousarray(np.asarray(x.make()), x.dtype)
        assert array.shape == x.shape, (name, array.shape, x.shape)
        out.write(array.reshape(-1).view(np.uint8).data)


def write_folder(
    folder: epath.Path, name: str, tensors: Mapping[str, Made], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes `{name}.safetensors`, or shards of at most `shard_bytes` and their index.

    Returns: the names of the files.
    """
    shards: list[dict[str, Made]] = [{}]
    for key, x in tensors.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = x
    count = len(shards)
    names = [f"{name}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{name}.safetensors"]
    else:
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
            "weight_map": {k: n for n, s in zip(names, shards, strict=True) for k in s},
        }
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("wb") as f:
            write_file(f, shard)
    return names


def to_bytes(tensors: Iterable[tuple[str, np.ndarray]]) -> bytes:
    """A whole file in memory, for small things."""
    out = io.BytesIO()
    write_file(out, {n: Made(x.shape, x.dtype, lambda x=x: x) for n, x in tensors})
    return out.getvalue()
