"""A run's folder: its lock and config, and what is written before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import SourceConfig, StudentConfig, TrainConfig, fields, files, lock
from janusflow_jax.config.errors import CheckpointError, ConfigError, JanusFlowError
from janusflow_jax.config.run import MAY_CHANGE, MAY_CHANGE_IN_BRANCH
from janusflow_jax.parallel import processes

BRANCH = "branch.json"
"""In a branch: the run and the step that it began from."""

DATA_FILE, DATA_KEYS = "data.json", ("name", "records", "content", "cache")


def reserve(workdir: epath.Path) -> lock.Lock:
    """Locks a workdir for this run.

    Raises:
      JanusFlowError: another run holds it.
      CheckpointError: it cannot be written.
    """
    with explained(workdir):
        return lock.Lock(workdir, "use another folder (--config.workdir=...)")


def is_of_store(error: Exception, workdir: Any) -> bool:
    """Whether an error may come from writing into a workdir: what reaches a bucket has its own."""
    of_devices = isinstance(error, jax.errors.JaxRuntimeError)
    return isinstance(error, OSError) or (files.is_remote(workdir) and not of_devices)


def explain(error: Exception, workdir: Any) -> str:
    """The message for a workdir that cannot be written, with advice."""
    if not isinstance(error, OSError):
        error = OSError(str(error))
    number = error.errno or 0
    advice = {
        errno.ENOSPC: "free some space, or use another --config.workdir",
        errno.EDQUOT: "free some space, or use another --config.workdir",
        errno.EROFS: "it is mounted read-only; use another --config.workdir",
        errno.EACCES: "make it writable for this user, or use another --config.workdir",
    }.get(number, "check the disk or the network")
    where = workdir
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        where = error.filename or workdir
        advice = "it is in the way: remove it, or use another --config.workdir"
    steps = model_folder.committed_steps(workdir)
    safe = f"; finished checkpoints: {steps}" if steps else ""
    return f"{where}: cannot be written: {error.strerror or error}: {advice}{safe}"


@contextlib.contextmanager
def explained(workdir: epath.Path) -> Iterator[None]:
    """Turns the error of a store in a block into a CheckpointError with advice."""
    try:
        yield
    except Exception as error:
        if isinstance(error, JanusFlowError) or not is_of_store(error, workdir):
            raise
        raise CheckpointError(explain(error, workdir)) from error


def check(workdir: epath.Path, cfg: TrainConfig, may_change: Sequence[str] = ()) -> TrainConfig:
    """Checks that the run in a folder has this config, apart from MAY_CHANGE and `may_change`.

    Returns:
      The config, with the packing that the run began with.
    Raises:
      CheckpointError: it has another config (lists every difference).
    """
    file = workdir / "config.json"
    if not file.exists():
        return _with_packing(cfg, newest_run(workdir).get("config"))  # a branch at its first start
    values = _stored_config(file)
    cfg = _with_packing(cfg, values)
    # Fields that the run's version did not have get their defaults.
    stored = _with_packing(config_lib.from_dict(TrainConfig, values), values)
    old, new = config_lib.to_dict(stored), config_lib.to_dict(cfg)
    if recorded_data(workdir):  # the content is compared instead of the paths (`check_data`)
        for then, now in zip(old["data"]["sources"], new["data"]["sources"], strict=False):
            then["path"] = now["path"]
            if then["cache"] and now["cache"]:
                then["cache"] = now["cache"]
    changes = fields.differences(old, new, (*MAY_CHANGE, *may_change))
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(
            f"{workdir}: holds a run of another config:\n{listed}\nUse the old values, or start a "
            "new run in another folder (--config.workdir=...)"
        )
    return cfg


def _with_packing(cfg: TrainConfig, stored: dict[str, Any] | None) -> TrainConfig:
    """A config with the packing of a stored one, which is 1 if it is older than that field."""
    if not stored:
        return cfg
    packing = stored.get("data", {}).get("packing", 1)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=packing))


def branch(workdir: epath.Path, cfg: TrainConfig, source: str) -> None:
    """Copies `base/` and a checkpoint of a run into a new workdir, which then resumes from it.

    Does nothing in a workdir that is this branch already.

    Args: source: 'RUN@STEP', the other run's workdir and one of its steps.
    Raises:
      ConfigError: a source of another form.
      CheckpointError: there is no such checkpoint, the workdir holds another run, or the config
        differs from the other run's in a field that no branch may change (lists all of them).
    """
    run, _, step = source.rpartition("@")
    if not (run and step.isdigit()):
        raise ConfigError(f"--branch-from: expected RUN@STEP, such as runs/a@5000; got {source!r}")
    origin = model_folder.resolve(run)
    about, mark = {"run": str(origin), "step": int(step)}, workdir / BRANCH
    begun = mark.exists() and model_folder.read_json(mark) == about
    present = [n for n in ("config.json", "base", "checkpoints") if (workdir / n).exists()]
    if present and not begun:
        raise CheckpointError(
            f"--branch-from: {workdir} holds a run that is not a branch of {source}: use another "
            "folder (--config.workdir=...)"
        )
    if "config.json" in present:
        return
    steps = model_folder.committed_steps(origin)
    if int(step) not in steps:
        raise CheckpointError(
            f"--branch-from: {origin} has no finished checkpoint of step {step}; it has "
            f"{steps or 'none'}"
        )
    check(origin, cfg, MAY_CHANGE_IN_BRANCH)
    saved = model_folder.read_json(origin / "checkpoints" / step / "run.json")
    then = config_lib.from_dict(TrainConfig, saved["config"])
    _check_rows_before(int(step), then, cfg)
    with explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(about))
        for name in ("base", f"checkpoints/{step}"):
            files.remove(workdir / name)  # of an interrupted copy
            files.copy(origin / name, workdir / name)
        same = _without_paths_and_weights(then) == _without_paths_and_weights(cfg)
        if same and (origin / DATA_FILE).exists():
            (origin / DATA_FILE).copy(workdir / DATA_FILE, overwrite=True)


def _without_paths_and_weights(cfg: TrainConfig) -> list[SourceConfig]:
    """The sources of a config; `data.json` knows where they lie."""
    other = {"path": "", "cache": "", "weight": 1.0, "weight_after": -1.0}
    return [dataclasses.replace(source, **other) for source in cfg.data.sources]


def _check_rows_before(step: int, then: TrainConfig, cfg: TrainConfig) -> None:
    """Checks that a branch counts the rows before its first step as the other run did.

    Raises:
      ConfigError: it leaves out rows that were trained on, so that other rows would be left out.
    """
    row = then.data.row_at(step * then.batch_rows)

    def before(values: Sequence[Any]) -> list[Any]:
        return [x for x in values if x[0] < row]

    old, new = before(then.data.skip_rows), before(cfg.data.skip_rows)
    if old != new:
        raise ConfigError(
            f"data.skip_rows: expected {old} before row {row}, where the branch begins; got {new}"
        )
    if before(then.data.phases()) != before(cfg.data.phases()):
        processes.log(
            f"WARNING: the mixture differs before row {row}, where the branch begins: its rows are "
            "numbered anew, so some samples repeat and others are left out. To change it from here "
            f"on, set data.change_row={row} and the weight_after of the sources"
        )


def newest_run(workdir: epath.Path) -> dict[str, Any]:
    """The newest `run.json` that is whole; {} where there is none."""
    for step in reversed(model_folder.committed_steps(workdir)):
        folder = workdir / "checkpoints" / str(step)
        if not checksums.damage(folder, ("run.json",)):
            return model_folder.read_json(folder / "run.json")
    return {}


def _stored_config(file: epath.Path) -> dict[str, Any]:
    """`config.json`; where it cannot be read, the config that the newest checkpoint repeats.

    Raises:
      CheckpointError: neither can be read.
    """
    try:
        config = model_folder.read_json(file)
        if isinstance(config, dict):
            return config
        raise CheckpointError(f"{file}: expected names and values; got {config!r:.40}")
    except CheckpointError as error:
        if run := newest_run(file.parent):
            processes.log(f"WARNING: {error}; the config of the newest checkpoint replaces it")
            return run["config"]
        raise CheckpointError(
            f"{error}; no checkpoint has a copy of it: remove {file} to start this run again"
        ) from error


def recorded_data(workdir: epath.Path) -> list[dict[str, Any]]:
    """`data.json`: the content of the run's sources at its last start (`rows.Source.identity`); []
    where there is none, or a damaged one."""
    file = workdir / DATA_FILE
    try:
        recorded = model_folder.read_json(file) if file.exists() else []
        return [{name: source[name] for name in DATA_KEYS} for source in recorded]
    except (CheckpointError, KeyError, TypeError) as error:
        processes.log(f"WARNING: {file}: cannot be read ({error}); it is replaced")
        return []


def check_data(
    workdir: epath.Path, then: list[dict[str, Any]], now: list[dict[str, Any]], accept: bool
) -> list[str]:
    """Compares the content of the sources with the recorded one; a line for each that changed.

    Raises:
      CheckpointError: some changed, and `accept` is not set.
    """
    changed = []
    for i, (old, new) in enumerate(zip(then, now, strict=False)):
        if what := [n for n in ("content", "cache") if old[n] != new[n]]:
            counts = f"{old['records']} records then, {new['records']} now"
            changed.append(
                f"data.sources[{i}] ({new['name']}): {' and '.join(what)} changed; {counts}"
            )
    if changed and not accept:
        listed = "\n".join(f"  - {line}" for line in changed)
        raise CheckpointError(
            f"{workdir}: the run's data have changed:\n{listed}\nRestore them, start a new run "
            "(--config.workdir=...), or pass --accept-data to continue with the new data"
        )
    return changed


def base_meta(workdir: epath.Path) -> dict[str, Any]:
    """`model.json` of the run's `base/`; {} before it is written."""
    file = workdir / "base" / model_folder.MODEL_FILE
    return model_folder.read_json(file) if file.exists() else {}


def create(
    workdir: epath.Path,
    cfg: TrainConfig,
    *,
    params: Any,
    vae: Any,
    hub: Any,
    about: dict[str, Any],
    data: list[dict[str, Any]],
) -> None:
    """Writes `config.json`, `data.json` and `base/`. All processes of a job call it; the first
    writes.

    Args:
      params: what the checkpoints will not repeat; None: nothing.
      about: JSON values for the base's `model.json`.
      data: what the sources are (`rows.Source.identity`).
    """
    with explained(workdir):
        # The config first: `check` then compares even if the run ends before the base is whole.
        if processes.is_main():
            with files.replacing(workdir / "config.json", "tmp") as part:
                part.write_text(json.dumps(config_lib.to_dict(cfg), indent=1))
            with files.replacing(workdir / DATA_FILE, "tmp") as part:
                part.write_text(json.dumps(data, indent=1))
        if not processes.from_main("exists" if base_meta(workdir) else ""):
            model_cfg = cfg.model
            if cfg.distills:  # its teacher
                model_cfg = dataclasses.replace(model_cfg, student=StudentConfig())
            model_folder.save_model(
                workdir / "base",
                model_cfg=model_cfg,
                params=params,
                vae=vae,
                hub_files=hub,
                extra=about,
                overwrite=True,
            )
