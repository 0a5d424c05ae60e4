"""Jobs of real processes on this machine, each with fake CPU devices of its own."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_S = 900  # of a hang; these machines may be slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(processes: int, process: int, devices: int, port: int) -> dict[str, str]:
    """What a process of a job must find in its environment."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    if processes > 1:
        env |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    return env


def command(data: Any, workdir: Any, *flags: str, patch: str = "") -> list[str]:
    """The crash test's run as a command.

    Args: flags: such as 'mesh.fsdp=2'. patch: Python that runs before.
    """
    code = f"from janusflow_jax import train\n{patch}\ntrain.run()"
    out = [sys.executable, "-c", code, f"--config=tools/crash_test.py:{data}"]
    return [*out, f"--config.workdir={workdir}", *(f"--config.{f}" for f in flags)]


class Process(subprocess.Popen):
    """A process whose output goes to a file: a full pipe would stop it."""

    def __init__(self, args: list[str], env: dict[str, str]):
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        super().__init__(args, cwd=ROOT, env=env, stdout=self._file, stderr=subprocess.STDOUT)

    def output(self) -> str:
        self._file.seek(0)
        return self._file.read()


def start(
    data: Any, workdir: Any, *flags: str, processes: int = 1, devices: int = 1, patch: str = ""
) -> list:
    """Starts the crash test's run as a job; see `command`."""
    port = free_port()
    return [
        Process(
            command(data, workdir, *flags, patch=patch),
            environment(processes, process, devices, port),
        )
        for process in range(processes)
    ]


def finish(job: list) -> list[tuple[int, str]]:
    """Exit status and output of every process."""
    try:
        return [(p.wait(timeout=TIMEOUT_S), p.output()) for p in job]
    finally:
        for p in job:
            p.kill()


def run(*args: Any, **kwargs: Any) -> str:
    """Runs a job to its end and returns what process 0 said; all must succeed."""
    ended = finish(start(*args, **kwargs))
    assert all(status == 0 for status, _ in ended), "\n".join(t[-3000:] for _, t in ended)
    return ended[0][1]
