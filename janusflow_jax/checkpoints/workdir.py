"""A run's folder: one run at a time in it, what it holds from the start, whether a config may go
on in it, and what to say when it cannot be written."""

from __future__ import annotations

import contextlib
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
from janusflow_jax.config import TrainConfig
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import processes

# What a run may change when it goes on: everything else makes it another run.
MAY_CHANGE = frozenset(
    "workdir num_steps log_every_steps save_every_steps keep_checkpoints sheet_every_steps "
    "tensorboard prompts heldout heldout_captions sheet_cfg_weight sheet_num_steps mesh "
    "made_by data.num_threads data.max_bad_share attention remat max_bad_steps peak_tflops "
    "keep_every_steps watchdog_s watchdog_exit evaluate".split()
)


LOCK = "lock"


class Lock:
    """Holds a workdir for this run, until `release` or the end of the process.

    On a disk: an advisory lock (`flock`), which the kernel frees however the process ends. A bucket
    has no such thing: there the last run to start holds the folder, and one that finds another's
    name in it ends before it would write (`check`).
    """

    def __init__(self, workdir: epath.Path):
        """Raises CheckpointError naming who holds the folder, or why it cannot be written."""
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
            print(f"{workdir}: this file system has no locks; two runs here would not see it")
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
            return "a process that has not written its name yet"

    def check(self) -> None:
        """Raises CheckpointError when another run has taken the folder (only in buckets)."""
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
    """What to do when a workdir cannot be written."""
    advice = {
        errno.ENOSPC: "free some space, or use another --config.workdir",
        errno.EDQUOT: "free some space, or use another --config.workdir",
        errno.EROFS: "it is mounted read-only; use another --config.workdir",
        errno.EACCES: "make it writable for this user, or use another --config.workdir",
    }.get(error.errno or 0, "check the disk or the network")
    steps = model_folder.committed_steps(workdir)
    kept = f"; whole and safe: checkpoints {steps}" if steps else ""
    return f"{workdir}: cannot be written: {error.strerror or error}: {advice}{kept}"


@contextlib.contextmanager
def explained(workdir: epath.Path) -> Iterator[None]:
    """Makes an OSError of a block a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain(error, workdir)) from error


def check(workdir: epath.Path, cfg: TrainConfig) -> None:
    """Checks that a run that is there already is the same run.

    Raises:
      CheckpointError: it holds a run of another config (lists every difference).
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    now = _flat_config(config_lib.to_dict(cfg))
    # a field that the run's version did not have stood at what is now its default
    then = _flat_config(config_lib.to_dict(TrainConfig())) | _flat_config(
        model_folder.read_json(file)
    )
    differ = [
        f"{n}: {then.get(n)!r} then, {now.get(n)!r} now"
        for n in sorted(then.keys() | now)
        if then.get(n) != now.get(n) and not _may_change(n)
    ]
    if differ:
        listed = "\n".join(f"  - {d}" for d in differ)
        raise CheckpointError(
            f"{workdir}: holds a run of another config:\n{listed}\nUse another folder "
            "(--config.workdir=...), or the old config to go on with it"
        )


def start_of(workdir: epath.Path) -> str:
    """The `base/` of a run that keeps its whole start there; '' for others, and new ones."""
    file = workdir / "base" / model_folder.MODEL_FILE
    whole = file.exists() and set(model_folder.read_json(file)["parts"]) - {"vae"}
    return str(file.parent) if whole else ""


def encoders_of(workdir: epath.Path) -> dict[str, str]:
    """Digests of the frozen encoders that a run's caches were checked against when it began."""
    file = workdir / "base" / model_folder.MODEL_FILE
    return model_folder.read_json(file).get("encoders", {}) if file.exists() else {}


def make(
    workdir: epath.Path,
    cfg: TrainConfig,
    *,
    params: Any,
    vae: Any,
    hub: Any,
    about: dict[str, Any],
) -> None:
    """Writes what a run's folder holds from the start: `config.json` and `base/`.

    All processes of a job call it; the first one writes.

    Args:
      params: what checkpoints will not repeat; None: nothing.
      about: JSON values for the base's `model.json`.
    """
    with explained(workdir):
        made = str((workdir / "base" / model_folder.MODEL_FILE).exists())
        if processes.from_main(made) == "False":
            model_folder.save_model(
                workdir / "base",
                model_cfg=cfg.model,
                params=params,
                vae=vae,
                hub_files=hub,
                extra=about,
                overwrite=True,
            )
        if processes.is_main():
            (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(cfg), indent=1))


def _may_change(name: str) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in MAY_CHANGE)


def _flat_config(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list):  # of sources, the only lists of dicts: each with its defaults
        source = config_lib.to_dict(config_lib.SourceConfig())
        values = [source | v if isinstance(v, dict) else v for v in values]
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat_config(value, f"{prefix}{name}.")
    return out
