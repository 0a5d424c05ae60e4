"""Model folders and training checkpoints: the only file that knows Orbax.

A model folder is `model.json`, `params/`, `vae/`, `hub/`; it may hold some parts only. A workdir is
`config.json`, `base/` (a model folder without `params/`) and `checkpoints/<step>/`. A checkpoint
counts only with its marker, written last, and every file's checksum is verified when it is read
(Orbax itself does not notice a flipped bit).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from janusflow_jax import config as config_lib
from janusflow_jax import trees
from janusflow_jax.checksums import (
    MARKER,
    CheckpointError,
    read_json,
    verify_sums,
    write_sums,
)
from janusflow_jax.config import ModelConfig
from janusflow_jax.models import janusflow, vae
from janusflow_jax.sharding import path_name
from janusflow_jax.trees import flat

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
        path, model_cfg=model_cfg, parts=trees, hub_files=hub_files, extra=lambda: extra,
        overwrite=overwrite,
    )  # fmt: skip


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
    part = out.parent / f".{out.name}.partial-{os.getpid()}"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    try:
        _fill_folder(part, model_cfg, parts, hub_files, extra)
    except BaseException:  # also Ctrl-C: nothing half-made stays
        part.rmtree()
        raise
    if out.exists():
        out.rmtree()
    part.rename(out)


def _fill_folder(
    folder: epath.Path, model_cfg: ModelConfig, parts: Any, hub_files: Any, extra: Any
) -> None:
    names = []
    for name, tree in parts:
        where = folder / name if name == "vae" else folder / "params" / name
        where.parent.mkdir(exist_ok=True)
        _save_tree(where, jax.tree.map(np.asarray, jax.device_get(tree)))
        names.append(name)
        del tree  # before the next one is made
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


def load_model(path: Any, weights: str = "ema") -> LoadedModel:
    """Reads a model folder, a workdir (its newest checkpoint), or one checkpoint of a workdir.

    Args:
      weights: 'ema' or 'params'; parts without an EMA (frozen ones) come from 'params'.
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
        return _load_step(folder, folder.parent.parent, weights)
    if (folder / "checkpoints").exists():
        steps = committed_steps(folder)
        if not steps:
            raise CheckpointError(
                f"{folder}: a training run without a finished checkpoint yet; let it train longer"
            )
        return _load_step(folder / "checkpoints" / str(steps[-1]), folder, weights)
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


def _load_step(folder: epath.Path, workdir: epath.Path, weights: str) -> LoadedModel:
    verify_sums(folder)
    run = read_json(folder / "run.json")
    cfg = config_lib.from_dict(ModelConfig, run["config"]["model"])
    params = _load_tree(folder / "params")
    if weights == "ema" and (folder / "ema").exists():
        params = trees.merge(params, _load_tree(folder / "ema"))
    base = _load_folder(workdir / "base")
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


def _save_tree(path: epath.Path, tree: Any) -> None:
    """Saves by Orbax, without a second copy of the arrays; its commit note keeps no path of this
    machine (model folders are shared)."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = PLAIN_BYTES
    small = sum(x.nbytes for x in jax.tree.leaves(tree)) <= PLAIN_BYTES
    context.array.saving.use_compression = small
    with context:
        ocp.save(path, tree)
    note = path / "commit_success.txt"
    if note.exists():
        note.write_text("Checkpoint commit was successful\n")


def _load_tree(path: Any) -> Any:
    """Every array of an Orbax folder, onto the default device."""
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


class RunCheckpoints:
    """A run's checkpoints: saved in the background, committed by a marker written last."""

    def __init__(self, workdir: Any, keep: int = 2) -> None:
        self.workdir, self.keep = epath.Path(workdir).resolve(), max(keep, 1)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def latest(self) -> int | None:
        """The newest committed step."""
        steps = committed_steps(self.workdir)
        return steps[-1] if steps else None

    def save(self, step: int, *, params: Any, ema: Any, opt_state: Any, run: Any) -> None:
        """Starts saving; returns when the arrays may be donated. Waits for the one before."""
        self.wait()
        folder = self.workdir / "checkpoints" / str(step)
        if folder.exists():
            folder.rmtree()
        folder.mkdir(parents=True)
        given = {"params": params, "ema": ema, "opt_state": flat(opt_state)}
        # Host copies: the next step is free to donate the device's buffers.
        host = {n: jax.tree.map(np.array, jax.device_get(t)) for n, t in given.items() if t}

        def finish() -> None:
            try:
                for name, tree in host.items():
                    _save_tree(folder / name, tree)
                (folder / "run.json").write_text(json.dumps(run, indent=1))
                write_sums(folder)
                (folder / MARKER).write_text(f"{step}\n")
                self._prune()
            except BaseException as error:  # noqa: BLE001 - raised by the next wait()
                self._error = error

        self._thread = threading.Thread(target=finish, name=f"save-{step}")
        self._thread.start()

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Reads a step into ShapeDtypeStructs with shardings.

        Args: abstract: {'params', 'ema', 'opt_state'}; params may be a part of what was saved.
        Returns: trees of the same structure, and what was saved as `run`.
        Raises:
          CheckpointError: damaged files, or arrays that do not fit (all listed).
        """
        folder = self.workdir / "checkpoints" / str(step)
        verify_sums(folder)
        out, problems = {}, []
        for name, want in abstract.items():
            if not jax.tree.leaves(want):
                out[name] = want
                continue
            saved, target = flat(ocp.metadata(folder / name).metadata), flat(want)
            have = {k: saved[k] for k in target if k in saved} if name == "params" else saved
            problems += compare_trees(target, have, name)
            if problems:
                continue
            rest = {k: v for k, v in saved.items() if k not in target}  # frozen: read, not kept
            whole = target | jax.tree.map(_replicated_like(target), rest)
            as_saved = whole if name == "opt_state" else trees.nested(whole)
            got = flat(ocp.load(folder / name, as_saved))
            leaves = [got[path_name(p)] for p, _ in _leaves(want)]
            out[name] = jax.tree.unflatten(jax.tree.structure(want), leaves)
        if problems:
            listed = "\n".join(f"  - {p}" for p in problems)
            raise CheckpointError(f"{folder}: is not of this config:\n{listed}")
        return out, read_json(folder / "run.json")

    def wait(self) -> None:
        """Returns when the last save is committed; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"{self.workdir}: the checkpoint was not saved: {error}") from (
                error
            )

    def close(self) -> None:
        self.wait()

    def _prune(self) -> None:
        for step in committed_steps(self.workdir)[: -self.keep]:
            folder = self.workdir / "checkpoints" / str(step)
            (folder / MARKER).unlink()  # first, so that a half-removed one does not count
            shutil.rmtree(folder) if os.path.isdir(folder) else folder.rmtree()


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _replicated_like(tree: Any) -> Any:
    """Makes abstract arrays with the sharding's devices of `tree`, whole on each of them."""
    some = jax.tree.leaves(tree)[0].sharding
    if isinstance(some, jax.sharding.NamedSharding):
        some = jax.sharding.NamedSharding(some.mesh, jax.sharding.PartitionSpec())
    return lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=some)
