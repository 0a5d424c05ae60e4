"""Machines that a run can be planned for, by name: their devices, without having them.

`v5e:16x16` is a TPU slice by its chips, `h100:8x8` hosts by cards. Figures are the makers' and
assumptions of every estimate; what XLA leaves of a TPU's memory was read off its own error messages
(libtpu 0.0.42).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import numpy as np

from janusflow_jax.config.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as it is rented. Rates are a chip's, `memory` a device's (a core, a card)."""

    platform: str  # tpu | gpu
    axes: int  # of the shape in its name
    memory: int  # bytes of a device that a program can use
    tflops: float  # dense bfloat16
    hbm: float  # bytes/s
    link: float  # bytes/s of a ring over one mesh axis: both directions of a torus axis, or NVLink
    network: float  # bytes/s between slices or hosts
    cores: int = 1  # devices of a chip, as JAX sees them
    examples: tuple[str, ...] = ()


CHIPS = {
    "v5e": Chip("tpu", 2, int(15.75 * GIB), 197.0, 819e9, 90e9, 3.1e9, 1, ("4x4", "8x8", "16x16")),
    "v6e": Chip(
        "tpu", 2, int(31.25 * GIB), 918.0, 1600e9, 180e9, 12.5e9, 1, ("4x4", "8x8", "16x16")
    ),
    "v5p": Chip("tpu", 3, int(95.74 * GIB), 459.0, 2765e9, 180e9, 6.25e9, 1, ("2x2x2", "4x4x4")),
    "v4": Chip("tpu", 3, int(15.25 * GIB), 275.0, 1228e9, 90e9, 3.1e9, 2, ("2x2x1", "4x4x4")),
    "v3": Chip("tpu", 2, int(15.48 * GIB), 123.0, 900e9, 140e9, 3.1e9, 2, ("2x2", "4x4")),
    "tpu7x": Chip("tpu", 3, int(94.75 * GIB), 2307.0, 7380e9, 200e9, 12.5e9, 2, ("2x2x1", "4x4x4")),
    # Of 79.1 GiB; JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    "h100": Chip("gpu", 2, int(0.92 * 79.1 * GIB), 989.0, 3352e9, 450e9, 50e9, 1, ("8", "8x8")),
}
"""What is known, by the first part of a topology's name."""

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
"""What XLA asks of a card (stream_executor's GpuTargetConfig, in text form)."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A topology by name: `kind` of CHIPS, its shape, and how many slices of that shape."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return int(np.prod(self.shape)) * self.slices

    @property
    def islands(self) -> int:
        """Parts of equal size between which only the slow network goes: slices, or GPU hosts."""
        return self.slices * (self.shape[0] if self.chip.platform == "gpu" else 1)

    @property
    def name(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        times = f"{self.slices} x " if self.slices > 1 else ""
        return f"{times}{self.kind}:{shape}"


def parse(name: str, slices: int = 1) -> Machine:
    """A machine by its name.

    Raises:
      ConfigError: the name says nothing that is known; the message lists what is.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name.strip())
    kind = found[1] if found else ""
    chip = CHIPS.get(kind)
    shape = tuple(int(n) for n in found[2].split("x")) if found else ()
    if chip is not None and chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    if chip is None or len(shape) != chip.axes or not all(shape):
        raise ConfigError(f"topology: got {name!r}; expected {known()}")
    if slices < 1:
        raise ConfigError(f"slices: expected 1 or more; got {slices}")
    return Machine(kind, shape, slices)


def known() -> str:
    """The names that work, in words."""
    lines = []
    for kind, chip in CHIPS.items():
        what = "cards, or hosts x cards" if chip.platform == "gpu" else "x".join("ABC"[: chip.axes])
        shown = ", ".join(f"{kind}:{e}" for e in chip.examples)
        lines.append(f"{kind}:{what} ({shown})")
    return "one of " + "; ".join(lines)


def devices(machine: Machine) -> list[Any]:
    """Devices that programs can be compiled for and not run on.

    Raises:
      ConfigError: the compiler for it is not installed (says what to install), or knows no such
        shape.
    """
    return list(_topology(machine).devices)


def _topology(machine: Machine) -> Any:
    import jax
    from jax.experimental import topologies

    if machine.chip.platform == "gpu":
        if not importlib.util.find_spec("jax_cuda13_plugin"):
            version = jax.__version__
            raise ConfigError(
                f"{machine.name}: XLA's compiler for NVIDIA is not installed; no card is needed:\n"
                f"  pip install jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
            )
        hosts, cards = machine.shape
        shape = f"{machine.slices}x{hosts}x{cards}"
        return topologies.get_topology_desc(
            platform="cuda", target_config=H100_TARGET, topology=shape
        )
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            f"{machine.name}: XLA's compiler for TPU is not installed; no TPU is needed:\n"
            f"  pip install 'jax[tpu]=={jax.__version__}'"
        )
    # libtpu looks for a machine around it, and for another process that uses it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = "x".join(str(n) for n in machine.shape)
    more: dict[str, Any] = {"num_slices": machine.slices} if machine.slices > 1 else {}
    if machine.chips == machine.slices:
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{machine.kind}:{shape}", **more
        )
    except Exception as error:  # JAX's own, with libtpu's reason in it
        raise ConfigError(f"topology {machine.name}: {error}\nexpected {known()}") from error
