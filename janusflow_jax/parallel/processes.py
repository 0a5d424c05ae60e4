"""Several processes of one job: finding the cluster, who speaks, and what all must agree on.

Everything here does nothing special with one process. What is agreed between steps goes over the
devices, as a number that is reduced ahead of the step that it is about (`Agreement`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.config.errors import ConfigError, JanusFlowError

MODES = ("auto", "on", "off")
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Set by whoever starts the processes where no cluster is known to JAX."""
GO_ON, STOP, FAILED = 0, 1, 2
"""What a process says of the step ahead; the largest holds for all."""
TEXT_BYTES = 4096
"""Of a message that processes exchange; longer ones are cut."""


def initialize(mode: str = "auto", env: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this job; before anything else is asked of JAX.

    Args: mode: 'on': there must be a cluster; 'auto': where there is one; 'off': never.
    Raises:
      ConfigError: an unknown mode, no cluster, or one that cannot be joined.
    """
    if mode not in MODES:
        raise ConfigError(f"--distributed: expected one of {', '.join(MODES)}; got {mode!r}")
    if mode == "off":
        return
    found = cluster(env)
    given = [n for n in BY_HAND if env.get(n)]
    if not found and given:
        raise ConfigError(
            f"--distributed: expected all of {', '.join(BY_HAND)}, or none; got only {given}"
        )
    if not found and mode == "on":
        raise ConfigError(
            "--distributed=on: expected a cluster (Slurm with several tasks, a TPU pod, GKE), or "
            f"{', '.join(BY_HAND)} set for every process; found none of them"
        )
    if not found:
        return
    by_hand: dict[str, Any] = {}
    if found == "environment":
        try:
            by_hand = {
                "coordinator_address": env[BY_HAND[0]],
                "num_processes": int(env[BY_HAND[1]]),
                "process_id": int(env[BY_HAND[2]]),
            }
        except ValueError as error:
            raise ConfigError(
                f"--distributed: expected whole numbers in {BY_HAND[1:]}; {error}"
            ) from error
    try:
        jax.distributed.initialize(**by_hand)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed: cannot join the job ({found}): {error}. --distributed=off trains "
            "with this process alone"
        ) from error
    if jax.default_backend() == "cpu":
        # Programs out of the cache run their collectives in another order in one process than in
        # the next: gloo takes one for the other and aborts (15 of 16 jobs of two processes; of
        # those that compiled, none of 16), or waits for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def cluster(env: Mapping[str, str]) -> str:
    """What kind of cluster this process was started in; '' for none."""
    if all(env.get(n) for n in BY_HAND):
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
        return "TPU VM"  # JAX asks the machine's metadata; a single host is a job of one process
    return ""


def count() -> int:
    """Processes of this job."""
    return jax.process_count()


def index() -> int:
    """This process among them; 0 is the one that speaks and writes."""
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
    """numpy copies of arrays that are spread over processes, on all of them.

    Array after array: a device never holds more than one whole, a host holds all.
    """
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def raise_together(error: BaseException | None, what: str) -> None:
    """Raises on all processes when one has an error: its own, or one that names whose it was.

    Raises:
      JanusFlowError: the error was another process's.
    """
    texts = gather("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text:
            raise JanusFlowError(f"{what}: process {process} of {count()}: {text}")


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block in which one process's error is everybody's (`raise_together` at its end).

    The block may not wait for other processes.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again below, on all processes
        error = caught
    raise_together(error, what)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What holds for all processes: the gravest of what they said."""

    code: int

    @property
    def go_on(self) -> bool:
        return self.code == GO_ON


class Agreement:
    """Lets all processes see the gravest code that one of them has, at the same step.

    The numbers are reduced on the devices, ahead of the step in their queue, so that reading the
    result waits for the step before at most, and no round trip between hosts is added. A CPU has no
    such queue: two programs run at once, and gloo takes the numbers of one for the other's. There
    each is waited for.
    """

    def __init__(self, mesh: Mesh):
        self._where = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._no_queue = mesh.devices.flat[0].platform == "cpu"
        self._worst = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def ask(self, code: Callable[[], int], before: Any = None) -> Callable[[], Verdict]:
        """Call on all processes in the same order; the result reads the verdict.

        Args: before: what the last step returned.

        With one process `code` is called when the verdict is read, with several at once.
        """
        if count() == 1:
            return lambda: Verdict(code())
        if self._no_queue:
            jax.block_until_ready(before)
        mine = code()
        said = jax.make_array_from_callback(
            (self._size,), self._where, lambda index: np.full(1, mine, np.int32)
        )
        worst = self._worst(said)
        if self._no_queue:
            jax.block_until_ready(worst)
        return lambda: Verdict(int(worst))


def exit_without_peers() -> NoReturn:
    """Exits at once, with status 1. A clean shutdown would wait for a process that has died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def lost_peer(error: Exception) -> str:
    """The message for a computation with other processes that failed."""
    return (
        f"error: process {index()} of {count()}: a computation with the other processes failed; "
        "most likely one of them has died (see their logs). Start all processes again: the run "
        f"resumes from its newest checkpoint. JAX reports: {str(error).splitlines()[0]}"
    )
