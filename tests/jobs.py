"""Jobs of real processes on this machine, each with fake CPU devices of its own."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 300


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


def start(data: Any, workdir: Any, *flags: str, processes: int = 1, devices: int = 1) -> list:
    """Starts the crash test's run as a job. `flags`: such as 'mesh.fsdp=2'."""
    port, out = free_port(), []
    command = [sys.executable, "-m", "janusflow_jax.train", f"--config=tools/crash_test.py:{data}"]
    command += [f"--config.workdir={workdir}", *(f"--config.{f}" for f in flags)]
    for process in range(processes):
        env = environment(processes, process, devices, port)
        out.append(
            subprocess.Popen(
                command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    return out


def finish(job: list) -> list[tuple[int, str]]:
    """Exit status and output of every process."""
    try:
        texts = [p.communicate(timeout=TIMEOUT_S)[0] for p in job]
    finally:
        for p in job:
            p.kill()
    return [(p.returncode, text) for p, text in zip(job, texts, strict=True)]


def run(*args: Any, **kwargs: Any) -> str:
    """Runs a job to its end and returns what process 0 said; all must succeed."""
    ended = finish(start(*args, **kwargs))
    assert all(status == 0 for status, _ in ended), "\n".join(t[-3000:] for _, t in ended)
    return ended[0][1]


def metrics(workdir: Any) -> list[dict[str, Any]]:
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
