"""Model folders, and the model of a training run: `save_model` and `load_model`.

A model folder is `model.json`, `params/`, `vae/` and `hub/`; it may have some of the parts only. A
workdir is `config.json`, `base/` (a model folder without `params/`; a LoRA run keeps all frozen
parameters there, and its checkpoints do not repeat them) and `checkpoints/<step>/`. A checkpoint
counts only with its marker, which is written last. Reading verifies the checksum of every file,
because Orbax does not notice a flipped bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints.checksums import (
    MARKER,
    SUMS_FILE,
    read_json,
    verify_sums,
    write_sums,
)
from janusflow_jax.config import ModelConfig, files, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.models import janusflow, lora, vae
from janusflow_jax.parallel import processes, sharding, trees

FORMAT = 2
"""2: every part is an Orbax folder; 1 (read only, as in `starts/`): all of `params/` is one."""
MODEL_FILE = "model.json"
PLAIN_BYTES = 256 << 20
"""Larger parts are not compressed: it takes five times the time and saves a fifth of the size."""


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """Orbax logs the tracebacks of errors in its threads, and raises the errors too."""
    return "_SignalingThread.run() raised" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_not_raised_too)


@dataclasses.dataclass
class LoadedModel:
    """A model in the memory of the host."""

    cfg: ModelConfig
    params: dict[str, Any] | None  # part -> tree of numpy arrays
    vae: Any  # tree of numpy arrays, or None
    hub: epath.Path  # folder of tokenizer files
    source: str  # folder of the weights
    meta: dict[str, Any]  # `model.json` or `run.json`

    @property
    def parts(self) -> list[str]:
        """Names of the parts that the model has."""
        return sorted(self.params or {}) + (["vae"] if self.vae is not None else [])


def resolve(path: Any) -> epath.Path:
    """`files.resolve` for what Orbax reads and writes.

    Raises:
      CheckpointError: a store that Orbax cannot open.
    """
    folder = files.resolve(path)
    if files.is_remote(folder) and not str(folder).startswith("gs://"):
        raise CheckpointError(
            f"{folder}: expected a local folder or a gs:// URL, because Orbax opens no other "
            "store: mount the store as a folder, or copy the model"
        )
    return folder


def is_model(path: Any) -> bool:
    """Whether a path holds something that `load_model` accepts; reads no weights."""
    folder = resolve(path)
    marks = (folder / MODEL_FILE, folder / MARKER)
    return any(m.exists() for m in marks) or bool(committed_steps(folder))


def check_out(
    out: Any, overwrite: bool, inputs: Sequence[Any] = (), made: Sequence[str] = ()
) -> None:
    """Raises CheckpointError if no model folder may be written to `out` (`files.problem_of_out`).

    Args:
      inputs: what the command reads.
      made: what it writes beside the model.
    """
    made = (MODEL_FILE, SUMS_FILE, "params", "vae", "hub", *made)
    mark = MODEL_FILE, '"parts"'
    if problem := files.problem_of_out(resolve(out), overwrite, mark, made, inputs):
        raise CheckpointError(problem)


def save_model(
    path: Any,
    *,
    model_cfg: ModelConfig,
    params: Mapping[str, Any] | Iterable[tuple[str, Any]] | None,
    vae: Any,
    hub_files: Any,
    extra: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a model folder. An interrupted save leaves nothing that loads.

    All processes of a job call it with the same trees; the first one writes.

    Args:
      params: part -> tree, any number of parts, with their dtypes. An iterator of pairs that makes
        each tree when it is asked for needs memory for the largest only; 'vae' may be among them.
      vae: the VAE's tree, or None.
      hub_files: folder whose files go to `hub/`, or name -> bytes, or None.
      extra: JSON values for `model.json`; read after the parts are written.
    Raises:
      CheckpointError: `path` exists and `overwrite` is not set, or it is no model folder.
    """
    out = resolve(path)
    check_out(out, overwrite)
    pairs: Any = params.items() if isinstance(params, Mapping) else params or ()
    names, main = [], processes.is_main()
    suffix = "" if processes.count() == 1 else "job"  # one name for all processes
    with files.replacing(out, suffix, active=main) as folder:
        if main:
            folder.mkdir()
        processes.barrier(f"save {out}")
        for name, tree in itertools.chain(pairs, [("vae", vae)] if vae else []):
            part = folder / name if name == "vae" else folder / "params" / name
            if main:
                part.parent.mkdir(exist_ok=True)
            _save_tree(part, tree)
            names.append(name)
            del tree  # before the next one is made
        if main:
            _copy_hub(hub_files, folder / "hub")
            meta = {
                "format": FORMAT,
                "config": config_lib.to_dict(model_cfg),
                "parts": sorted(names, key=lambda name: (name == "vae", name)),
                **extra,
            }
            (folder / MODEL_FILE).write_text(json.dumps(meta, indent=1))
            write_sums(folder)
    processes.barrier(f"saved {out}")


def _copy_hub(hub_files: Any, out: epath.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if hub_files is not None and not isinstance(hub_files, dict):
        folder = files.resolve(hub_files)
        hub_files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for name, data in (hub_files or {}).items():
        (out / name).write_bytes(data)


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk."""

    shape: tuple[int, ...]
    dtype: Any
    folder: epath.Path  # the Orbax folder that has it
    name: str  # in that folder


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk, its checksums verified; `read` reads arrays."""

    cfg: ModelConfig
    arrays: dict[str, StoredArray]  # by name; those of the VAE begin with 'vae/'
    hub: epath.Path  # folder of tokenizer files
    source: str  # folder of the weights
    meta: dict[str, Any]  # `model.json` or `run.json`
    merged: bool = True  # adapters (LoRA) are added to their kernels

    @property
    def shapes(self) -> dict[str, Any]:
        """ShapeDtypeStructs of what `read` can read, by part."""
        out = {}
        for name, x in self.arrays.items():
            if not (self.merged and parts_lib.is_lora_path(name)):
                dtype = np.float32 if self._is_adapted(name) else x.dtype
                out[name] = jax.ShapeDtypeStruct(x.shape, dtype)
        return trees.unflatten(out)

    def read(self, like: dict[str, Any]) -> dict[str, Any]:
        """Reads arrays in the types of their targets.

        Args:
          like: a tree of targets by part: numpy arrays for arrays on the host, ShapeDtypeStructs
            with shardings for arrays of which each device reads its shard.
        Raises:
          CheckpointError: an array holds NaN or infinity.
        """
        targets, out = trees.flatten(like), {}
        adapted = [n for n in targets if self._is_adapted(n)]
        stored = {n: self.arrays[n] for n in targets if n not in adapted}
        for folder in dict.fromkeys(x.folder for x in stored.values()):
            names = {n: x.name for n, x in stored.items() if x.folder == folder}
            loaded = load_tree(folder, trees.unflatten({names[n]: targets[n] for n in names}))
            loaded = trees.flatten(loaded)
            out |= {n: loaded[names[n]] for n in names}
        for name in adapted:  # one at a time, because they are whole on the host
            value, target = self._merged(name).astype(targets[name].dtype), targets[name]
            on_host = isinstance(target, np.ndarray)
            out[name] = value if on_host else sharding.put_tree(value, target.sharding)
        if non_finite := trees.non_finite(out):
            listed = "\n".join(f"  - {name}: {trees.NON_FINITE}" for name in non_finite)
            raise CheckpointError(
                f"{self.source}: arrays that no model can use; take an earlier checkpoint, or "
                f"convert it again from whole files:\n{listed}"
            )
        return trees.unflatten(out)

    def _is_adapted(self, name: str) -> bool:
        return self.merged and name.endswith("/kernel") and _beside(name, "lora_a") in self.arrays

    def _merged(self, name: str) -> np.ndarray:
        """A kernel with its adapter added."""
        names = [name, *(_beside(name, n) for n in (*parts_lib.LORA_TRAINED, parts_lib.LORA_SCALE))]
        targets = {n: np.empty(self.arrays[n].shape, self.arrays[n].dtype) for n in names}
        leaves = dataclasses.replace(self, merged=False).read(trees.unflatten(targets))
        return trees.flatten(lora.merge(leaves))[name]


def _beside(name: str, leaf: str) -> str:
    """'llm/attn/q/kernel', 'lora_a' -> 'llm/attn/q/lora_a'."""
    return f"{name.rpartition('/')[0]}/{leaf}"


def load_model(path: Any, weights: str = "ema", merged: bool = True) -> LoadedModel:
    """Reads a model folder, a workdir (its newest checkpoint), or one checkpoint of a workdir.

    Args and errors: those of `open_model`.
    """
    model = open_model(path, weights, merged)
    params = model.read(jax.tree.map(lambda x: np.empty(x.shape, x.dtype), model.shapes))
    vae_params = params.pop("vae", None)
    return LoadedModel(model.cfg, params or None, vae_params, model.hub, model.source, model.meta)


def open_model(path: Any, weights: str = "ema", merged: bool = True) -> ModelFiles:
    """Opens what `load_model` reads, without reading an array.

    Args:
      weights: 'ema' or 'params'; parts without an EMA (frozen ones) come from 'params'.
      merged: add a run's adapters (LoRA) to the kernels; False: return both.
    Raises:
      CheckpointError: nothing there that loads, a damaged file, or arrays that do not fit the
        config (all of them in one message).
    """
    if weights not in ("ema", "params"):
        raise CheckpointError(f"weights: expected 'ema' or 'params'; got {weights!r}")
    folder = resolve(path)
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: no such folder; expected a model folder (with {MODEL_FILE}), a training "
            "run's folder, or one of its checkpoints"
        )
    if (folder / MODEL_FILE).exists():
        return _open_folder(folder)
    if (folder / MARKER).exists():
        return _open_step(folder, folder.parent.parent, weights, merged)
    if steps := committed_steps(folder):
        return _open_step(folder / "checkpoints" / str(steps[-1]), folder, weights, merged)
    if (folder / "checkpoints").exists():
        raise CheckpointError(f"{folder}: no finished checkpoint yet; let it train longer")
    raise CheckpointError(
        f"{folder}: expected a model folder ({MODEL_FILE}), a training run with a finished "
        f"checkpoint, or such a checkpoint (with {MARKER}); found none of them. A Hugging Face "
        "folder is converted by tools/convert_checkpoint.py"
    )


def _open_folder(folder: epath.Path) -> ModelFiles:
    meta = read_json(folder / MODEL_FILE)
    if meta.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{folder}: expected format 1 or {FORMAT}; got {meta.get('format')!r}: written by "
            "another version of janusflow_jax"
        )
    verify_sums(folder)
    cfg = config_lib.from_dict(ModelConfig, meta["config"])
    names = [p for p in meta["parts"] if p != "vae"]
    if meta["format"] == 1 and names:
        arrays = _stored(folder / "params")
    else:
        arrays = {}
        for part in names:
            arrays |= _stored(folder / "params" / part, f"{part}/")
    if "vae" in meta["parts"]:
        arrays |= _stored(folder / "vae", "vae/")
    out = ModelFiles(cfg, arrays, folder / "hub", str(folder), meta)
    _check_arrays(folder, cfg, out.shapes)
    return out


def _open_step(folder: epath.Path, workdir: epath.Path, weights: str, merged: bool) -> ModelFiles:
    """A run's model. Does not read the optimizer's files, which are most of a checkpoint."""
    ema = weights == "ema" and (folder / "ema").exists()
    try:
        verify_sums(folder, ("params", "run.json", *(["ema"] if ema else [])))
    except CheckpointError as error:
        others = [s for s in committed_steps(workdir) if str(s) != folder.name]
        raise CheckpointError(f"{error} (other steps: {others or 'none'})") from error
    run = read_json(folder / "run.json")
    cfg = config_lib.from_dict(ModelConfig, run["config"]["model"])
    base = _open_folder(workdir / "base")
    arrays = base.arrays | _stored(folder / "params") | (_stored(folder / "ema") if ema else {})
    out = ModelFiles(cfg, arrays, base.hub, str(folder), run, merged)
    if merged:
        _check_arrays(folder, cfg, out.shapes)
    return out


def _stored(folder: epath.Path, prefix: str = "") -> dict[str, StoredArray]:
    """The arrays of an Orbax folder by name."""
    leaves = trees.flatten(ocp.metadata(folder).metadata)
    return {f"{prefix}{n}": StoredArray(x.shape, x.dtype, folder, n) for n, x in leaves.items()}


def _check_arrays(folder: epath.Path, cfg: ModelConfig, shapes: dict[str, Any]) -> None:
    """Raises CheckpointError with every array that does not fit the config."""
    wanted = {**janusflow.param_shapes(cfg), "vae": vae.param_shapes(cfg.vae)}
    wanted = {part: tree for part, tree in wanted.items() if part in shapes}
    if problems := trees.mismatches(wanted, shapes, "params"):
        listed = "\n".join(f"  - {p}" for p in problems)
        raise CheckpointError(f"{folder}: its arrays do not fit its config:\n{listed}")


def saving(tree: Any) -> ocp.Context:
    """Orbax options for saving a tree: no copy of host arrays, no compression of large parts."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = PLAIN_BYTES
    small = sum(x.nbytes for x in jax.tree.leaves(tree)) <= PLAIN_BYTES
    context.array.saving.use_compression = small
    return context


def strip_local_paths(path: epath.Path) -> None:
    """Removes this machine's paths from Orbax's commit file: people publish model folders."""
    file = path / "commit_success.txt"
    if file.exists():
        file.write_text("Checkpoint commit was successful\n")


def _save_tree(path: epath.Path, tree: Any) -> None:
    """Sharded arrays are written by the processes that have their shards."""
    tree = jax.tree.map(lambda x: x if _is_sharded(x) else np.asarray(x), tree)
    with saving(tree):
        ocp.save(path, tree)
    if processes.is_main():
        strip_local_paths(path)


def _is_sharded(x: Any) -> bool:
    return isinstance(x, jax.Array) and len(x.sharding.device_set) > 1


def load_tree(path: Any, like: Any = None) -> Any:
    """Every array of an Orbax folder, as numpy arrays: a device may not have room for all.

    Args: like: targets of the arrays to read instead, as in `ModelFiles.read`.
    """
    path = resolve(path)  # Orbax accepts absolute paths only
    if like is None:
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), ocp.metadata(path).metadata)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, like)


def committed_steps(workdir: Any) -> list[int]:
    """Steps with a finished checkpoint, ascending.

    Raises:
      CheckpointError: `checkpoints` is a file.
    """
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder of checkpoints; got a file: remove it")
    steps = (p for p in folder.iterdir() if p.name.isdigit() and (p / MARKER).exists())
    return sorted(int(p.name) for p in steps)
