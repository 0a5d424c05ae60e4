"""Model folders, and the model that a training run holds. Orbax is known here and in
`run_checkpoints`, which writes and resumes runs.

A model folder is `model.json`, `params/`, `vae/`, `hub/`; it may hold some parts only. A workdir is
`config.json`, `base/` (a model folder without `params/`; where adapters train, with all of the
start's, which checkpoints then do not repeat) and `checkpoints/<step>/`. A checkpoint counts only
with its marker, written last, and every file's checksum is verified when it is read (Orbax itself
does not notice a flipped bit).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints.checksums import MARKER, read_json, verify_sums, write_sums
from janusflow_jax.config import ModelConfig
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.models import janusflow, lora, vae
from janusflow_jax.parallel import processes, trees
from janusflow_jax.parallel.trees import flat

FORMAT = 2
"""2: every part is an Orbax folder of its own; 1: `params/` is one (still read)."""
MODEL_FILE = "model.json"
PLAIN_BYTES = 256 << 20
"""Parts above this size are not compressed: it costs five times the time and saves a fifth."""


@dataclasses.dataclass
class LoadedModel:
    """cfg; params: part -> tree (float arrays on the default device); vae: tree or None; hub:
    folder of tokenizer files; source: where the weights are; meta: `model.json` or `run.json`."""

    cfg: ModelConfig
    params: dict[str, Any] | None
    vae: Any
    hub: epath.Path
    source: str
    meta: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """Names of the parts that are there."""
        return sorted(self.params or {}) + (["vae"] if self.vae is not None else [])


def is_model(path: Any) -> bool:
    """Whether `load_model` would find something at a path; nothing is read."""
    folder = epath.Path(path)
    marks = (folder / MODEL_FILE, folder / MARKER)
    return any(m.exists() for m in marks) or bool(committed_steps(folder))


def compare_trees(expected: Any, got: Any, where: str) -> list[str]:
    """Every missing, unknown and misshaped array of `got`, one line each."""
    want, have = flat(expected), flat(got)
    out = [f"{where}/{n}: missing, expected shape {want[n].shape}" for n in want.keys() - have]
    out += [f"{where}/{n}: unknown, of shape {have[n].shape}" for n in have.keys() - want]
    out += [
        f"{where}/{n}: expected shape {tuple(want[n].shape)}; got {tuple(have[n].shape)}"
        for n in want.keys() & have
        if tuple(want[n].shape) != tuple(have[n].shape)
    ]
    return sorted(out)


def save_model(
    path: Any,
    *,
    model_cfg: ModelConfig,
    params: dict[str, Any] | None,
    vae: Any,
    hub_files: Any,
    extra: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a model folder from trees in memory; see `save_parts`.

    Args: params: part -> tree, any number of parts; None: none. vae: the VAE's tree, or None.
      extra: JSON values for `model.json`.
    """
    trees = [*(params or {}).items(), *([("vae", vae)] if vae else [])]
    save_parts(
        path,
        model_cfg=model_cfg,
        parts=trees,
        hub_files=hub_files,
        extra=lambda: extra,
        overwrite=overwrite,
    )


def save_parts(
    path: Any,
    *,
    model_cfg: ModelConfig,
    parts: Iterable[tuple[str, Any]],
    hub_files: Any,
    extra: Callable[[], dict[str, Any]],
    overwrite: bool = False,
) -> None:
    """Writes a model folder part by part; an interrupted save leaves nothing that loads.

    All processes of a job call it with the same trees; the first one writes.

    Args:
      parts: (part, tree) one after another, dtypes kept, 'vae' among them; one that makes its
        trees when they are asked for needs memory for the largest only.
      hub_files: folder whose files go to `hub/`, or name -> bytes, or None.
      extra: called last; gives JSON values for `model.json`, such as what made it.
    Raises:
      CheckpointError: something is there and `overwrite` is not set.
    """
    out = epath.Path(path).resolve()
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists; choose another path or pass --overwrite")
    main = processes.is_main()
    unique = os.getpid() if processes.count() == 1 else "job"  # one name for all processes
    part = out.parent / f".{out.name}.partial-{unique}"
    if main:
        if part.exists():
            part.rmtree()
        part.mkdir(parents=True)
    processes.barrier(f"save {out}")
    try:
        _fill_folder(part, model_cfg, parts, hub_files, extra)
    except BaseException:  # also Ctrl-C: nothing half-made stays
        if main:
            part.rmtree()
        raise
    if main:
        if out.exists():
            out.rmtree()
        part.rename(out)
    processes.barrier(f"saved {out}")


def _fill_folder(
    folder: epath.Path, model_cfg: ModelConfig, parts: Any, hub_files: Any, extra: Any
) -> None:
    names = []
    for name, tree in parts:
        where = folder / name if name == "vae" else folder / "params" / name
        if processes.is_main():
            where.parent.mkdir(exist_ok=True)
        _save_tree(where, jax.tree.map(np.asarray, jax.device_get(tree)))
        names.append(name)
        del tree  # before the next one is made
    if not processes.is_main():
        return
    _copy_hub(hub_files, folder / "hub")
    meta = {
        "format": FORMAT,
        "config": config_lib.to_dict(model_cfg),
        "parts": sorted(set(names) - {"vae"}) + (["vae"] if "vae" in names else []),
        **extra(),
    }
    (folder / MODEL_FILE).write_text(json.dumps(meta, indent=1))
    write_sums(folder)


def _copy_hub(files: Any, out: epath.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if files is None:
        return
    if not isinstance(files, dict):
        folder = epath.Path(files)
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for name, data in files.items():
        (out / name).write_bytes(data)


def load_model(path: Any, weights: str = "ema", merged: bool = True) -> LoadedModel:
    """Reads a model folder, a workdir (its newest checkpoint), or one checkpoint of a workdir.

    Args:
      weights: 'ema' or 'params'; parts without an EMA (frozen ones) come from 'params'.
      merged: add a run's adapters (LoRA) to their kernels; False: they stand beside them.
    Raises:
      CheckpointError: nothing there that loads, a damaged file, or arrays that do not fit the
        config (all of them in one message).
    """
    if weights not in ("ema", "params"):
        raise CheckpointError(f"weights: expected 'ema' or 'params'; got {weights!r}")
    folder = epath.Path(path).resolve()
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: no such folder; expected a model folder (with {MODEL_FILE}), a training "
            "run's folder, or one of its checkpoints"
        )
    if (folder / MODEL_FILE).exists():
        return _load_folder(folder)
    if (folder / MARKER).exists():
        return _load_step(folder, folder.parent.parent, weights, merged)
    if (folder / "checkpoints").exists():
        steps = committed_steps(folder)
        if not steps:
            raise CheckpointError(
                f"{folder}: a training run without a finished checkpoint yet; let it train longer"
            )
        return _load_step(folder / "checkpoints" / str(steps[-1]), folder, weights, merged)
    if folder.parent.name == "checkpoints":
        raise CheckpointError(
            f"{folder}: this checkpoint was never finished (no {MARKER}); use another step of "
            f"{folder.parent}, or the run's folder for the newest finished one"
        )
    raise CheckpointError(
        f"{folder}: expected {MODEL_FILE} (a model folder) or checkpoints/ (a training run); "
        "found neither. A Hugging Face folder is converted by tools/convert_checkpoint.py"
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
    if meta["format"] == 1:
        params = _load_tree(folder / "params") if parts else None
    else:
        params = {p: _load_tree(folder / "params" / p) for p in parts} or None
    tree = _load_tree(folder / "vae") if "vae" in meta["parts"] else None
    _check_parts(folder, cfg, params, tree, parts)
    return LoadedModel(cfg, params, tree, folder / "hub", str(folder), meta)


def _load_step(folder: epath.Path, workdir: epath.Path, weights: str, merged: bool) -> LoadedModel:
    """A run's model; the optimizer's files, the most of a checkpoint, are not even read."""
    ema = weights == "ema" and (folder / "ema").exists()
    try:
        verify_sums(folder, ("params", "run.json", *(["ema"] if ema else [])))
    except CheckpointError as error:
        others = [s for s in committed_steps(workdir) if str(s) != folder.name]
        raise CheckpointError(f"{error} (finished ones here: {others or 'none'})") from error
    run = read_json(folder / "run.json")
    cfg = config_lib.from_dict(ModelConfig, run["config"]["model"])
    params = _load_tree(folder / "params")
    if ema:
        params = trees.merge(params, _load_tree(folder / "ema"))
    base = _load_folder(workdir / "base")
    params = trees.merge(base.params or {}, params)
    if merged:
        params = lora.merge(params)
        _check_parts(folder, cfg, params, None, list(params))
    return LoadedModel(cfg, params, base.vae, base.hub, str(folder), run)


def _check_parts(
    folder: epath.Path, cfg: ModelConfig, params: Any, tree: Any, parts: list[str]
) -> None:
    """Compares what was read with what the config says, all problems at once."""
    expected = janusflow.param_shapes(cfg)
    problems = [f"{p}: unknown part" for p in (params or {}) if p not in expected]
    problems += [f"{p}: missing part" for p in parts if p not in (params or {})]
    for part in sorted(set(params or {}) & set(expected)):
        problems += compare_trees(expected[part], params[part], part)
    if tree is not None:
        problems += compare_trees(vae.param_shapes(cfg.vae), tree, "vae")
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise CheckpointError(f"{folder}: its arrays do not fit its config:\n{listed}")


def saving(tree: Any) -> ocp.Context:
    """How a tree is saved: without a second copy of host arrays, large ones not compressed."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = PLAIN_BYTES
    small = sum(x.nbytes for x in jax.tree.leaves(tree)) <= PLAIN_BYTES
    context.array.saving.use_compression = small
    return context


def tidy(path: epath.Path) -> None:
    """Takes the paths of this machine out of Orbax's commit note: model folders are shared."""
    note = path / "commit_success.txt"
    if note.exists():
        note.write_text("Checkpoint commit was successful\n")


def _save_tree(path: epath.Path, tree: Any) -> None:
    with saving(tree):
        ocp.save(path, tree)
    if processes.is_main():
        tidy(path)


def _load_tree(path: Any) -> Any:
    """Every array of an Orbax folder, onto this process's first device."""
    path = epath.Path(path).resolve()  # Orbax takes absolute paths only
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device),
        ocp.metadata(path).metadata,
    )
    return ocp.load(path, abstract)


def committed_steps(workdir: Any) -> list[int]:
    """Steps with a finished checkpoint, ascending."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / MARKER).exists())
    return sorted(int(p.name) for p in found)
