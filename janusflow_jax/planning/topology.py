"""Machines to plan for, by name, and XLA's stand-ins for their devices.

`v5e:16x16` is a TPU slice of 16 x 16 chips, `h100:8x8` is 8 hosts with 8 GPUs each.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel.chips import CHIPS, Chip

H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA needs to know to compile for a GPU (GpuTargetConfig of its stream_executor, as text)."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A topology: a `kind` of `CHIPS`, the shape of a slice and the number of slices."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def islands(self) -> int:
        """Equal groups of devices that only the slow network connects: TPU slices, GPU hosts."""
        return self.slices * (self.shape[0] if self.chip.platform == "gpu" else 1)

    @property
    def name(self) -> str:
        shape = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices} x {shape}" if self.slices > 1 else shape


def is_ring(machine: Machine, coords: Sequence[Sequence[int]]) -> bool:
    """Whether devices can send around a ring of links of a torus, or only along an open line.

    An axis of a slice closes to a ring where it is whole: at 16 chips (v5e, v6e), at a multiple of
    4 (three axes). Blocks of two axes hold a ring too.

    Args: coords: of the devices in the slice.
    """
    if machine.chip.platform == "gpu":  # all are equally near
        return True
    values = [sorted(set(axis)) for axis in zip(*coords, strict=True)]
    lines = [(axis, len(v)) for axis, v in enumerate(values) if len(v) > 1]
    if len(lines) != 1:
        return True
    (axis, size), multiple = lines[0], 16 if machine.chip.axes == 2 else 4
    return size == machine.shape[axis] and size % multiple == 0


def parse(name: str, slices: int = 1) -> Machine:
    """A machine by its name.

    Raises:
      ConfigError: an unknown name; the message lists those that work.
    """
    kind, _, sizes = name.strip().partition(":")
    shape = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
    chip = CHIPS.get(kind)
    if chip is not None and chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    if chip is None or len(shape) != chip.axes or not all(shape):
        raise ConfigError(f"topology: got {name!r}; expected {expected()}")
    if slices < 1:
        raise ConfigError(f"slices: expected 1 or more; got {slices}")
    return Machine(kind, shape, slices)


def expected() -> str:
    """The names that work, for error messages."""
    names = "; ".join(
        f"{kind}:"
        + ("GPUS or HOSTSxGPUS" if chip.platform == "gpu" else "x".join("ABC"[: chip.axes]))
        for kind, chip in CHIPS.items()
    )
    return f"{names} (for example v5e:4x4, v5p:2x2x2, h100:8x8)"


def devices(machine: Machine) -> Sequence[Any]:
    """Devices that programs can be compiled for but not run on.

    Raises:
      ConfigError: the compiler is not installed (the message says what to install), or it knows
        no such shape.
    """
    gpu = machine.chip.platform == "gpu"
    version = jax.__version__
    packages = f"'jax[tpu]=={version}'"
    if gpu:
        packages = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
    if not importlib.util.find_spec("jax_cuda13_plugin" if gpu else "libtpu"):
        raise ConfigError(
            f"{machine.name}: XLA's compiler for it is not installed. No device is needed:\n"
            f"  pip install {packages}"
        )
    shape = "x".join(map(str, machine.shape))
    if gpu:
        return topologies.get_topology_desc(
            platform="cuda", target_config=H100_TARGET, topology=f"{machine.slices}x{shape}"
        ).devices
    # Without these libtpu queries the metadata server and refuses to share the host's lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": machine.slices} if machine.slices > 1 else {}
    if math.prod(machine.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{machine.kind}:{shape}", **options
        ).devices
    except Exception as error:  # JAX's own, with libtpu's reason in it
        raise ConfigError(f"topology {machine.name}: {error}\nexpected {expected()}") from error
