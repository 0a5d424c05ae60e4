"""A run's folder: its lock, its config, and what is written before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import TrainConfig, fields, files
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import processes

MAY_CHANGE = tuple(
    "workdir num_steps log_every_steps save_every_steps keep_checkpoints sheet_every_steps "
    "tensorboard prompts heldout heldout_captions sheet_cfg_weight sheet_num_steps mesh "
    "made_by data.num_threads data.max_bad_share attention remat max_bad_steps peak_tflops "
    "keep_every_steps watchdog_s watchdog_exit evaluate".split()
)
"""Fields that a resumed run may change. Any other change makes it another run."""

LOCK = "lock"


class Lock:
    """Reserves a workdir for this run, until `release` or the end of the process.

    On a disk it is an advisory lock (`flock`), which the kernel frees however the process ends.
    Buckets have no locks: there the last run to start owns the folder, and an earlier run ends
    before its next write (`check`).
    """

    def __init__(self, workdir: epath.Path):
        """Raises CheckpointError: another run holds the folder, or it cannot be written."""
        self._path, self._file = workdir / LOCK, None
        self._me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "id": uuid.uuid4().hex,
        }
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if "://" not in str(workdir):
                self._file = open(os.fspath(self._path), "a+")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{workdir}: another run is writing here: {self._holder()}. Wait for it or stop "
                "it, or use another folder (--config.workdir=...)"
            ) from error
        except OSError as error:
            if self._file is None or error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise CheckpointError(explain(error, workdir)) from error
            print(f"{workdir}: this file system has no locks; never start two runs in it")
        try:
            self._path.write_text(json.dumps(self._me))
        except OSError as error:
            raise CheckpointError(explain(error, workdir)) from error

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _holder(self) -> str:
        try:
            held = json.loads(self._path.read_text())
            return f"process {held['pid']} on {held['host']}, since {held['since']}"
        except (OSError, ValueError, KeyError):
            return "a process that has not written its name"

    def check(self) -> None:
        """Raises CheckpointError if another run has taken the folder (buckets only)."""
        held = model_folder.read_json(self._path)
        if held["id"] != self._me["id"]:
            raise CheckpointError(
                f"{self._path.parent}: taken over by {self._holder()}; this run ends"
            )

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def explain(error: OSError, workdir: Any) -> str:
    """The message for a workdir that cannot be written, with advice."""
    advice = {
        errno.ENOSPC: "free some space, or use another --config.workdir",
        errno.EDQUOT: "free some space, or use another --config.workdir",
        errno.EROFS: "it is mounted read-only; use another --config.workdir",
        errno.EACCES: "make it writable for this user, or use another --config.workdir",
    }.get(error.errno or 0, "check the disk or the network")
    steps = model_folder.committed_steps(workdir)
    safe = f"; finished checkpoints: {steps}" if steps else ""
    return f"{workdir}: cannot be written: {error.strerror or error}: {advice}{safe}"


@contextlib.contextmanager
def explained(workdir: epath.Path) -> Iterator[None]:
    """Turns an OSError in a block into a CheckpointError with advice."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain(error, workdir)) from error


def check(workdir: epath.Path, cfg: TrainConfig) -> TrainConfig:
    """Checks that the run in a folder has this config, apart from what may change.

    Returns:
      The config, with the packing that the run began with.
    Raises:
      CheckpointError: it has another config (lists every difference).
    """
    file = workdir / "config.json"
    if not file.exists():
        return cfg
    values = model_folder.read_json(file)
    values["data"].setdefault("packing", 1)
    # Other fields that the run's version did not have get their defaults.
    then = config_lib.from_dict(TrainConfig, values)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, packing=then.data.packing))
    changes = fields.differences(config_lib.to_dict(then), config_lib.to_dict(cfg), MAY_CHANGE)
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(
            f"{workdir}: holds a run of another config:\n{listed}\nUse another folder "
            "(--config.workdir=...), or the old config to resume it"
        )
    return cfg


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
