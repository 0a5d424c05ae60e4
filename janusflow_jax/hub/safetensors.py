"""Folders of safetensors, read and written one tensor at a time."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from janusflow_jax.config.errors import ConvertError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
WEIGHT_NAMES = ("model", "diffusion_pytorch_model", "open_clip_model")
"""Names of the weights in published folders, without their endings."""
SHARD_BYTES = 5_000_000_000
_PICKLES = (".bin", ".pt", ".ckpt")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read or computed each time `np.asarray` asks for it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.load()).astype(dtype or self.dtype, copy=False)


@functools.cache
def local(path: epath.Path) -> str:
    """The path, or a temporary copy of a remote file: safetensors maps local files only."""
    if "://" not in str(path):
        return str(path)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(path.copy(epath.Path(folder) / path.name))


def _read_tensor(path: epath.Path, name: str) -> np.ndarray:
    # The file is opened again for each tensor. Closing it unmaps it; otherwise all pages that were
    # ever read would stay resident, and a conversion would need memory for the whole file.
    with safetensors.safe_open(local(path), framework="numpy") as file:
        return file.get_tensor(name)


def read_header(path: epath.Path) -> dict[str, LazyTensor]:
    """The tensors of one file.

    Raises:
      ConvertError: the file is damaged or no safetensors file.
    """
    try:
        with safetensors.safe_open(local(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: LazyTensor(
                    tuple(x.get_shape()),
                    np.dtype(DTYPES[x.get_dtype()]),
                    functools.partial(_read_tensor, path, name),
                )
                for name, x in slices.items()
            }
    except KeyError as error:
        raise ConvertError(f"{path}: dtype {error} is not supported") from error
    except safetensors.SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(8) == b"version "
        hint = (
            "it is a Git LFS pointer; run 'git lfs pull'"
            if pointer
            else f"got {path.stat().length} bytes; download it again"
        )
        raise ConvertError(f"{path}: expected a safetensors file; {hint} ({error})") from error


class Folder(NamedTuple):
    """The weights of a folder.

    `complete`: all files could be read, so names and shapes can be compared. `ignored`: names of
    other weights that were not read.
    """

    tensors: dict[str, LazyTensor]
    files: list[epath.Path]
    problems: list[str]
    ignored: list[str]
    complete: bool


def open_folder(folder: epath.Path, names: Sequence[str] = WEIGHT_NAMES) -> Folder:
    """Reads the headers of a folder's weights: one file, or shards with an index.

    Args: names: possible names of the weights without their ending; the first that exists counts.
    """
    if not folder.is_dir():
        return Folder({}, [], [f"{folder}: no such folder"], [], False)
    entries = {p.name: p for p in folder.iterdir() if p.is_file()}
    problems: list[str] = []
    listed: list[str] = []
    for name in names:
        if f"{name}.safetensors" in entries:
            listed = [f"{name}.safetensors"]
            break
        if f"{name}.safetensors.index.json" in entries:
            listed = _read_index(entries[f"{name}.safetensors.index.json"], problems)
            break
    weights = [n for n in sorted(entries) if n.endswith((".safetensors", *_PICKLES))]
    ignored = [n for n in weights if n not in listed]
    if not listed and not problems:
        problems.append(_no_weights(folder, entries, names))

    tensors: dict[str, LazyTensor] = {}
    complete = bool(listed)
    for file in listed:
        try:
            if file not in entries:
                raise ConvertError(f"{folder / file}: missing, but the index lists it")
            header = read_header(entries[file])
        except (OSError, ConvertError) as error:
            problems.append(str(error))
            complete = False
            continue
        doubled = sorted(header.keys() & tensors)
        problems += [f"duplicate: {n} is in {file} and in another shard" for n in doubled]
        tensors |= header
    files = [entries[n] for n in listed if n in entries]
    return Folder(tensors, files, problems, ignored, complete)


def _read_index(path: epath.Path, problems: list[str]) -> list[str]:
    """The files that an index lists. What is in them is compared with the model, not the index."""
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if not files or any("/" in file for file in files):
            raise ValueError("weight_map: expected names of files")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: expected an index with a weight_map; {error!r}")
        return []


def _no_weights(folder: epath.Path, entries: Mapping[str, Any], names: Sequence[str]) -> str:
    if pickles := [n for n in sorted(entries) if n.endswith(_PICKLES)]:
        return (
            f"{folder}: only {', '.join(pickles)}: a pickle can run code and is not read; convert "
            "it with torch.load(..., weights_only=True) and safetensors.torch.save_file to "
            f"{names[0]}.safetensors"
        )
    files = ", ".join(sorted(entries)[:8]) or "an empty folder"
    expected = " or ".join(f"{n}.safetensors" for n in names)
    return f"{folder}: expected {expected}, or shards with an index; got {files}"


def write_folder(
    folder: epath.Path,
    name: str,
    tensors: Mapping[str, LazyTensor],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes `{name}.safetensors`, or shards of at most `shard_bytes` and their index.

    Returns: the names of the files.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow; readers do not need it

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda x: x.nbytes,
        filename_pattern=f"{name}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file, keys in split.filename_to_tensors.items():
        with (folder / file).open("wb") as out:
            _write_file(out, {key: tensors[key] for key in keys})
    return list(split.filename_to_tensors)


def _write_file(out: Any, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes one file tensor by tensor; the library's writer needs all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {
            "dtype": _CODES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name, x in tensors.items():
        array = np.asarray(x, order="C")
        assert array.shape == x.shape, (name, array.shape, x.shape)
        out.write(array.reshape(-1).view(np.uint8).data)
