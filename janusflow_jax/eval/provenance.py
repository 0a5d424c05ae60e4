"""What a report measured: checksums of the model and the data, and the software."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import files as config_files
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.hub import adapters, download, safetensors as safetensors_io


def resolve(path: Any) -> epath.Path:
    """The folder that will be loaded. Of a run it is the newest checkpoint, which never changes; of
    hf://organization/name, the converted model in the cache."""
    path = download.model_of(path) if download.is_repository(path) else path
    folder = model_folder.resolve(path)
    if (folder / model_folder.MODEL_FILE).exists() or not (folder / "checkpoints").exists():
        return folder
    steps = model_folder.committed_steps(folder)
    return folder / "checkpoints" / str(steps[-1]) if steps else folder


def of(path: Any, adapter: Any = "") -> dict[str, str]:
    """SHA-256 of everything that is loaded from a folder of `resolve`, and of an adapter.

    `checksums.json` covers every file of a model or a checkpoint; `model.json` and `run.json` are
    their configs; `base/checksums.json` covers what a checkpoint uses from its run's `base/` (VAE,
    tokenizer, frozen parts); `adapter` is an adapter's config and weights.
    """
    folder = model_folder.resolve(path)
    out = {}
    for name in (checksums.SUMS_FILE, model_folder.MODEL_FILE, "run.json"):
        if (folder / name).exists():
            out[name] = sha256(folder / name)
    base = folder.parent.parent / "base" / checksums.SUMS_FILE
    if model_folder.MODEL_FILE not in out and base.exists():
        out[f"base/{checksums.SUMS_FILE}"] = sha256(base)
    return out | ({"adapter": of_adapter(adapter)} if adapter else {})


def digest(path: Any, adapter: Any = "") -> str:
    """One SHA-256 of everything in `of`."""
    text = json.dumps(of(path, adapter), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_adapter(path: Any) -> str:
    """SHA-256 over an adapter's config and weights, which are one file or shards.

    Raises:
      ConvertError: no adapter's weights.
      OSError: a file is missing.
    """
    folder = config_files.resolve(path)
    weights = safetensors_io.weight_files(folder, (adapters.WEIGHTS,))
    return _hash([folder / adapters.CONFIG, *weights])


def of_data(path: Any) -> dict[str, str]:
    """SHA-256 over the names and contents of a data set's files, as `files_sha256`.

    Raises:
      JanusFlowError: no such folder.
    """
    folder = config_files.resolve(path)
    if not folder.is_dir():
        raise JanusFlowError(
            f"--data: expected a folder of tools/prepare_openmoji.py; there is no {str(path)!r}"
        )
    files = sorted((x for x in folder.iterdir() if x.is_file()), key=lambda x: x.name)
    return {"files_sha256": _hash(files)}


def software() -> dict[str, str]:
    """Software that numbers may depend on."""
    return {"jax": jax.__version__, "backend": jax.default_backend()}


def sha256(file: epath.Path) -> str:
    """Of a small file; '' where there is none."""
    return checksums.file_sha256(file) if file.exists() else ""


def _hash(files: Iterable[epath.Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0")
        total.update(bytes.fromhex(checksums.file_sha256(file)))
    return total.hexdigest()
