"""A run's folder: its lock and config, and what is written before the first step."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import checksums, model_folder
from janusflow_jax.config import TrainConfig, fields, files, lock
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import processes

MAY_CHANGE = tuple(
    "workdir num_steps log_every_steps save_every_steps keep_checkpoints sheet_every_steps "
    "tensorboard prompts heldout heldout_captions sheet_cfg_weight sheet_num_steps mesh "
    "made_by data.num_threads data.max_bad_share attention remat max_bad_steps peak_tflops "
    "keep_every_steps watchdog_s watchdog_exit evaluate".split()
)
"""Fields that a resumed run may change. Any other change makes it another run."""


def reserve(workdir: epath.Path) -> lock.Lock:
    """Locks a workdir for this run.

    Raises:
      JanusFlowError: another run holds it.
      CheckpointError: it cannot be written.
    """
    with explained(workdir):
        return lock.Lock(workdir, "use another folder (--config.workdir=...)")


def explain(error: OSError, workdir: Any) -> str:
    """The message for a workdir that cannot be written, with advice."""
    advice = {
        errno.ENOSPC: "free some space, or use another --config.workdir",
        errno.EDQUOT: "free some space, or use another --config.workdir",
        errno.EROFS: "it is mounted read-only; use another --config.workdir",
        errno.EACCES: "make it writable for this user, or use another --config.workdir",
    }.get(error.errno or 0, "check the disk or the network")
    where = workdir
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        where = error.filename or workdir
        advice = "it is in the way: remove it, or use another --config.workdir"
    steps = model_folder.committed_steps(workdir)
    safe = f"; finished checkpoints: {steps}" if steps else ""
    return f"{where}: cannot be written: {error.strerror or error}: {advice}{safe}"


@contextlib.contextmanager
def explained(workdir: epath.Path) -> Iterator[None]:
    """Turns an OSError in a block into a CheckpointError with advice."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain(error, workdir)) from error


def check(workdir: epath.Path, cfg: TrainConfig, may_change: Sequence[str] = ()) -> None:
    """Checks that the run in a folder has this config, apart from MAY_CHANGE and `may_change`.

    Raises:
      CheckpointError: it has another config (lists every difference).
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    # Fields that the run's version did not have get their defaults.
    then = config_lib.from_dict(TrainConfig, _stored_config(file))
    may_change = (*MAY_CHANGE, *may_change)
    changes = fields.differences(config_lib.to_dict(then), config_lib.to_dict(cfg), may_change)
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(
            f"{workdir}: holds a run of another config:\n{listed}\nUse another folder "
            "(--config.workdir=...), or the old config to resume it"
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
) -> None:
    """Writes `config.json` and `base/`, once. All processes of a job call it; the first writes.

    Args:
      params: what the checkpoints will not repeat; None: nothing.
      about: JSON values for the base's `model.json`.
    """
    with explained(workdir):
        # The config first: `check` then compares even if the run ends before the base is whole.
        if processes.is_main():
            with files.replacing(workdir / "config.json", "tmp") as part:
                part.write_text(json.dumps(config_lib.to_dict(cfg), indent=1))
        if not processes.from_main("exists" if base_meta(workdir) else ""):
            model_folder.save_model(
                workdir / "base",
                model_cfg=cfg.model,
                params=params,
                vae=vae,
                hub_files=hub,
                extra=about,
                overwrite=True,
            )
