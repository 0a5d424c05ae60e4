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
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from janusflow_jax.checkpoints.checksums import read_json
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.config.files import LFS_HELP, LFS_POINTER, is_remote

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
    if not is_remote(path):
        return str(path)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(path.copy(epath.Path(folder) / path.name))


def _read_tensor(path: epath.Path, name: str) -> np.ndarray:
    # The file is opened again for each tensor. Closing it unmaps it; otherwise all pages that were
    # ever read would stay resident, and a conversion would need memory for the whole file.
    with safetensors.safe_open(local(path), framework="numpy") as file:
        return file.get_tensor(name)


def open_file(path: epath.Path) -> dict[str, LazyTensor]:
    """The tensors of one file.

    Raises:
      ConvertError: the file is damaged or no safetensors file.
      OSError: there is no such file.
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
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        hint = LFS_HELP if is_pointer else "download it again"
        raise ConvertError(f"{path}: expected a safetensors file; {hint} ({error})") from error


def weight_files(folder: epath.Path, names: Sequence[str] = WEIGHT_NAMES) -> list[epath.Path]:
    """The files of a folder's weights: one file, or the shards that an index lists.

    Args: names: possible names of the weights without their ending; the first that exists counts.
    Raises:
      ConvertError: no such folder, or no weights in it.
      CheckpointError: an index that is no JSON file.
    """
    for name in names:
        file = folder / f"{name}.safetensors"
        index = folder / f"{name}.safetensors.index.json"
        if file.exists():
            return [file]
        if index.exists():
            values = read_json(index)
            weight_map = values.get("weight_map") if isinstance(values, dict) else None
            shards = weight_map.values() if isinstance(weight_map, dict) else ()
            if not shards or not all(isinstance(shard, str) for shard in shards):
                raise ConvertError(f"{index}: expected an index of shards with a weight_map")
            return [folder / shard for shard in sorted({*shards})]
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder")
    present = sorted(p.name for p in folder.iterdir())
    expected = " or ".join(f"{name}.safetensors" for name in names)
    message = f"{folder}: expected {expected}, or shards with an index; got {present[:8]}"
    if any(name.endswith(_PICKLES) for name in present):
        message += (
            ". A pickle can run code and is not read: convert it with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )
    raise ConvertError(message)


def open_folder(folder: epath.Path, names: Sequence[str] = WEIGHT_NAMES) -> dict[str, LazyTensor]:
    """The tensors of a folder's `weight_files`, which raises as that and `open_file` do."""
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(folder, names):
        shard = open_file(file)
        if repeated := sorted(tensors.keys() & shard.keys()):
            raise ConvertError(f"{file}: {repeated[0]} is in another shard too")
        tensors |= shard
    return tensors


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
