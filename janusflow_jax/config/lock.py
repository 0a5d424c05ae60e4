"""A lock on a folder that one process writes: a run's workdir, or a data set while it is made."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from typing import Any

from janusflow_jax.config.errors import JanusFlowError

FILE = "lock"


class Lock:
    """Reserves a folder for this process, until `release` or the end of the process.

    On a disk it is an advisory lock (`flock`), which the kernel frees however the process ends.
    Buckets and some network file systems have no locks: there the last process to start owns the
    folder, and an earlier one ends before its next write (`check`).
    """

    def __init__(self, folder: Any, advice: str):
        """Creates the folder where there is none.

        Args:
          folder: an `epath.Path`.
          advice: what to do if another process holds the folder.
        Raises:
          JanusFlowError: another process holds the folder.
          OSError: the folder cannot be written.
        """
        self._path, self._file = folder / FILE, None
        self._me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "id": uuid.uuid4().hex,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if "://" not in str(folder):
            self._file = open(os.fspath(self._path), "a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise JanusFlowError(
                    f"{folder}: another process is writing here: {self._holder()}. Wait for it or "
                    f"stop it, or {advice}"
                ) from error
            except OSError as error:  # NFS, FUSE and Lustre have many answers for "no locks"
                print(
                    f"WARNING: {folder}: this file system has no locks ({error.strerror}): "
                    "a second process that starts here is not noticed",
                    flush=True,
                )
        self._path.write_text(json.dumps(self._me))

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _read(self) -> dict[str, Any]:
        """What the owner wrote; {} where that cannot be read."""
        try:
            held = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return held if isinstance(held, dict) else {}

    def _holder(self) -> str:
        held = self._read()
        if not {"pid", "host", "since"} <= held.keys():
            return "a process that has not written its name"
        return f"process {held['pid']} on {held['host']}, since {held['since']}"

    def check(self) -> None:
        """Raises JanusFlowError if another process has taken the folder."""
        if self._read().get("id", self._me["id"]) != self._me["id"]:
            raise JanusFlowError(
                f"{self._path.parent}: taken over by {self._holder()}; this process ends"
            )

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
