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
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints.checksums import MARKER, read_json, verify_sums, write_sums
from janusflow_jax.config import ModelConfig, files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.models import janusflow, lora, vae
from janusflow_jax.parallel import processes, trees

FORMAT = 2
"""2: every part is an Orbax folder; 1 (read only, as in `starts/`): all of `params/` is one."""
MODEL_FILE = "model.json"
PLAIN_BYTES = 256 << 20
"""Larger parts are not compressed: it takes five times the time and saves a fifth of the size."""


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
      CheckpointError: `path` exists and `overwrite` is not set.
    """
    out = resolve(path)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists; choose another path or pass --overwrite")
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
            _save_tree(part, jax.tree.map(np.asarray, jax.device_get(tree)))
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
        folder = epath.Path(hub_files)
        hub_files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for name, data in (hub_files or {}).items():
        (out / name).write_bytes(data)


def load_model(path: Any, weights: str = "ema", merged: bool = True) -> LoadedModel:
    """Reads a model folder, a workdir (its newest checkpoint), or one checkpoint of a workdir.

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
        return _load_folder(folder)
    if (folder / MARKER).exists():
        return _load_step(folder, folder.parent.parent, weights, merged)
    if steps := committed_steps(folder):
        return _load_step(folder / "checkpoints" / str(steps[-1]), folder, weights, merged)
    if (folder / "checkpoints").exists():
        raise CheckpointError(f"{folder}: no finished checkpoint yet; let it train longer")
    raise CheckpointError(
        f"{folder}: expected a model folder ({MODEL_FILE}), a training run with a finished "
        f"checkpoint, or such a checkpoint (with {MARKER}); found none of them. A Hugging Face "
        "folder is converted by tools/convert_checkpoint.py"
    )


def _load_folder(folder: epath.Path) -> LoadedModel:
    meta = read_json(folder / MODEL_FILE)
    if meta.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{folder}: expected format 1 or {FORMAT}; got {meta.get('format')!r}: written by "
            "another version of janusflow_jax"
        )
    verify_sums(folder)
    cfg = config_lib.from_dict(ModelConfig, meta["config"])
    parts = [p for p in meta["parts"] if p != "vae"]
    if meta["format"] == 1 and parts:
        params = load_tree(folder / "params")
    else:
        params = {p: load_tree(folder / "params" / p) for p in parts}
    vae_params = load_tree(folder / "vae") if "vae" in meta["parts"] else None
    _check_arrays(folder, cfg, params, vae_params)
    return LoadedModel(cfg, params or None, vae_params, folder / "hub", str(folder), meta)


def _load_step(folder: epath.Path, workdir: epath.Path, weights: str, merged: bool) -> LoadedModel:
    """A run's model. Does not read the optimizer's files, which are most of a checkpoint."""
    ema = weights == "ema" and (folder / "ema").exists()
    try:
        verify_sums(folder, ("params", "run.json", *(["ema"] if ema else [])))
    except CheckpointError as error:
        others = [s for s in committed_steps(workdir) if str(s) != folder.name]
        raise CheckpointError(f"{error} (other steps: {others or 'none'})") from error
    run = read_json(folder / "run.json")
    cfg = config_lib.from_dict(ModelConfig, run["config"]["model"])
    params = load_tree(folder / "params")
    if ema:
        params = trees.merge(params, load_tree(folder / "ema"))
    base = _load_folder(workdir / "base")
    params = trees.merge(base.params or {}, params)
    if merged:
        params = lora.merge(params)
        _check_arrays(folder, cfg, params, None)
    return LoadedModel(cfg, params, base.vae, base.hub, str(folder), run)


def _check_arrays(folder: epath.Path, cfg: ModelConfig, params: Any, vae_params: Any) -> None:
    """Raises CheckpointError with every array that does not fit the config."""
    expected = janusflow.param_shapes(cfg) if params else {}
    expected = {part: tree for part, tree in expected.items() if part in params}
    problems = trees.mismatches(expected, params, "params")
    if vae_params is not None:
        problems += trees.mismatches(vae.param_shapes(cfg.vae), vae_params, "vae")
    if problems:
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
    with saving(tree):
        ocp.save(path, tree)
    if processes.is_main():
        strip_local_paths(path)


def load_tree(path: Any) -> Any:
    """Every array of an Orbax folder, as numpy arrays: a device may not have room for all."""
    path = resolve(path)  # Orbax accepts absolute paths only
    shapes = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), ocp.metadata(path).metadata)
    return ocp.load(path, shapes)


def committed_steps(workdir: Any) -> list[int]:
    """Steps with a finished checkpoint, ascending."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return []
    steps = (p for p in folder.iterdir() if p.name.isdigit() and (p / MARKER).exists())
    return sorted(int(p.name) for p in steps)
