"""Several processes of one job: joining the cluster, logging, errors, and agreeing when to stop.

With one process these functions do nothing special. Between steps the processes agree through the
devices: they reduce a number ahead of the step that it concerns (`Agreement`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the address that JAX found has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.config.errors import ConfigError, JanusFlowError

MODES = ("auto", "on", "off")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables for clusters that JAX does not detect."""
CONTINUE, STOP, FAILED = 0, 1, 2
"""The status of a process before a step; the most severe status wins."""
WAIT_REPORT_S, WAIT_LIMIT_S = 15, 300
SHUTDOWN_LIMIT_S = 60
"""How long a process that ends, with an error too, waits for the others before it aborts."""
CAUSES = {
    "Slurm": "Were they started? `srun --pty` gives a shell to one task only: start the training "
    "itself with srun, or train with this process alone (--distributed=off)",
    "environment": f"Were they started, each with its own {VARIABLES[2]}, and does that address "
    "reach process 0? --distributed=off trains with this process alone",
}
"""Why the other processes of a kind of cluster may not come."""
TEXT_BYTES = 4096
"""Size of a message between processes; longer ones are cut."""


def initialize(mode: str = "auto", env: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this job. Call it before anything else that uses JAX.

    Args: mode: 'on': a cluster is required; 'auto': join if there is one; 'off': never join.
    Raises:
      ConfigError: an unknown mode, no cluster, or one that cannot be joined.
    """
    if mode not in MODES:
        raise ConfigError(f"--distributed: expected one of {', '.join(MODES)}; got {mode!r}")
    if mode == "off":
        return
    kind = cluster(env)
    partial = [n for n in VARIABLES if env.get(n)]
    if not kind and partial:
        raise ConfigError(
            f"--distributed: expected all of {', '.join(VARIABLES)}, or none; got only {partial}"
        )
    if not kind and mode == "on":
        raise ConfigError(
            "--distributed=on: expected a cluster (Slurm with several tasks, a TPU pod, GKE), or "
            f"{', '.join(VARIABLES)} set for every process; got neither"
        )
    if not kind:
        if (tasks := env.get("SLURM_NTASKS", "1")) != "1":
            print(
                f"Slurm's job has {tasks} tasks, but srun did not start this process: it trains "
                "alone. To train with all of them, start it with srun (launch/slurm.sh)",
                file=sys.stderr,
            )
        return
    options: dict[str, Any] = {}
    if kind == "environment":
        try:
            options = {
                "coordinator_address": env[VARIABLES[0]],
                "num_processes": int(env[VARIABLES[1]]),
                "process_id": int(env[VARIABLES[2]]),
            }
        except ValueError as error:
            raise ConfigError(
                f"--distributed: expected whole numbers in {VARIABLES[1:]}; {error}"
            ) from error
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _limited_wait(kind):
            # JAX ends the process with a stack after its own limit.
            jax.distributed.initialize(
                **options,
                initialization_timeout=WAIT_LIMIT_S + 60,
                shutdown_timeout_seconds=SHUTDOWN_LIMIT_S,
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed: cannot join the job ({kind}): {error}. --distributed=off trains "
            "with this process alone"
        ) from error
    signal.signal(signal.SIGTERM, on_sigterm)  # JAX's preemption service, unused here, takes it
    if jax.default_backend() == "cpu":
        # Programs from the cache run their collectives in a different order in each process. Gloo
        # then confuses them and aborts or hangs: 15 of 16 jobs of two processes did, and none of
        # the 16 that compiled.
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def _limited_wait(kind: str) -> Iterator[None]:
    """Reports every 15 s that this process waits for the others; ends it at the limit."""
    joined, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not joined.wait(WAIT_REPORT_S):
            waited = time.monotonic() - began
            job = distributed.global_state
            print(
                f"process {job.process_id} of {job.num_processes} waits for the others at "
                f"{job.coordinator_address}, for {waited:.0f} of {WAIT_LIMIT_S} s. "
                + CAUSES.get(kind, "Are all of them started?"),
                file=sys.stderr,
                flush=True,
            )
            if waited >= WAIT_LIMIT_S:
                print(
                    f"error: --distributed: the other processes did not come in {WAIT_LIMIT_S} s: "
                    "start all of them, or train with this one alone (--distributed=off)",
                    file=sys.stderr,
                )
                exit_without_peers()

    threading.Thread(target=watch, name="waiting for processes", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def cluster(env: Mapping[str, str]) -> str:
    """The kind of cluster that this process was started in; '' for none."""
    if all(env.get(n) for n in VARIABLES):
        return "environment"
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and tasks != "1":
        return "Slurm"
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return ""
    if env.get("MEGASCALE_COORDINATOR_ADDRESS") or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "GKE or several slices"
    chips = any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))
    if chips and importlib.util.find_spec("libtpu") and not env.get("TPU_SKIP_MDS_QUERY"):
        return "TPU VM"  # JAX reads the machine's metadata; a single host is a job of one process
    return ""


def count() -> int:
    """Number of processes of this job."""
    return jax.process_count()


def index() -> int:
    """Number of this process; process 0 logs and writes."""
    return jax.process_index()


def is_main() -> bool:
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints on the first process only."""
    if is_main():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Waits for all processes. From the main thread only: it uses the devices."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(text: str) -> list[str]:
    """Every process's text, in order. From the main thread only."""
    if count() == 1:
        return [text]
    data = text.encode()[:TEXT_BYTES]
    padded = np.zeros(TEXT_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(count(), TEXT_BYTES)
    return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in rows]


def from_main(text: str) -> str:
    """The first process's text, on all."""
    return gather(text)[0]


def whole(tree: Any) -> Any:
    """Numpy copies of arrays that are sharded over processes, on every process.

    It copies one array at a time: a device never holds more than one whole array, a host all.
    """
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def raise_together(error: BaseException | None, what: str) -> None:
    """Raises on all processes if one has an error: its own error, or one that names the process.

    Raises:
      JanusFlowError: another process had the error.
    """
    texts = gather("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text:
            raise JanusFlowError(f"{what}: process {process} of {count()}: {text}")


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block after which all processes raise if one did (`raise_together`).

    The block must not wait for other processes.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again below, on all processes
        error = caught
    raise_together(error, what)


class Slowest(NamedTuple):
    """The process that worked longest on its own before a step, while the others waited for it."""

    process: int
    seconds: float  # at most MAX_SECONDS
    cause: str  # 'data': it waited for its rows; 'host': it counted and copied them


MAX_SECONDS = 16
_CAUSES = ("data", "host")


def encode_work(data: float, host: float) -> int:
    """The seconds of this process as a number whose maximum over processes is the slowest one."""
    milliseconds = min(round(1000 * (data + host)), 1000 * MAX_SECONDS)
    return (milliseconds << 17) | ((host > data) << 16) | index()


def decode_work(number: int) -> Slowest:
    """The inverse of `encode_work`."""
    cause = _CAUSES[(number >> 16) & 1]
    return Slowest(number & 0xFFFF, (number >> 17) / 1000, cause)


class Agreement:
    """Gives all processes the most severe status of any process, at the same step, and the slowest
    process.

    The devices reduce both before the step in their queue. Reading the result waits for the
    previous step at most, without another round trip between hosts. CPUs have no such queue: two
    programs run at once and gloo confuses their numbers, so each is waited for.
    """

    def __init__(self, mesh: Mesh):
        self._where = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._no_queue = mesh.devices.flat[0].platform == "cpu"
        self._worst = jax.jit(lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, P()))

    def ask(
        self, code: Callable[[], tuple[int, int]], before: Any = None
    ) -> Callable[[], tuple[int, int]]:
        """Starts a reduction; calling the result returns the largest of each number.

        All processes call it in the same order. With one process, `code` is called when the result
        is read; with several, at once.

        Args:
          code: returns this process's status and work (`encode_work`).
          before: what the last step returned.
        """
        if count() == 1:
            return code
        if self._no_queue:
            jax.block_until_ready(before)
        mine = code()
        numbers = jax.make_array_from_callback(
            (self._size, 2), self._where, lambda index: np.array([mine], np.int32)
        )
        worst = self._worst(numbers)
        if self._no_queue:
            jax.block_until_ready(worst)

        def read() -> tuple[int, int]:
            status, work = np.asarray(worst)
            return int(status), int(work)

        return read


def exit_without_peers() -> NoReturn:
    """Exits at once, with status 1. A clean shutdown would wait for a process that has died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def lost_peer(error: Exception) -> str:
    """The message for a computation with other processes that failed."""
    return (
        f"process {index()} of {count()}: a computation with the other processes failed; "
        "most likely one of them has died (see their logs). Start all processes again: the run "
        f"resumes from its newest checkpoint. JAX reports: {str(error).splitlines()[0]}"
    )
