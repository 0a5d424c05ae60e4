"""Accelerators: what utilization in training and plans for other machines need to know about them.

Figures are the makers'. The memory that XLA leaves to a program on TPU was read off its own error
messages (libtpu 0.0.42). That of a GPU assumes XLA_PYTHON_CLIENT_MEM_FRACTION=0.92; without
it JAX preallocates 75 %.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are per chip, memory is per device (a TPU core, a GPU)."""

    platform: str  # tpu | gpu
    axes: int  # of the topology's shape
    gib: float  # memory of a device that a program can use
    tflops: int  # dense bfloat16 peak
    hbm: float  # bytes/s
    link: float  # bytes/s of a ring over one mesh axis: both directions of a torus axis, or NVLink
    network: float  # bytes/s between slices or hosts
    cores: int  # devices of a chip, as JAX sees them
    ghz: float  # clock of the compiler's estimates; 0: it makes none
    kinds: str = ""  # beginnings of jax's device_kind, separated by '|'; '': not known

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.gib * GIB)


CHIPS = {
    "v5e": Chip("tpu", 2, 15.75, 197, 819e9, 90e9, 3.1e9, 1, 1.5, "TPU v5 lite|TPU v5e"),
    "v6e": Chip("tpu", 2, 31.25, 918, 1.6e12, 180e9, 12.5e9, 1, 1.75, "TPU v6 lite|TPU v6e"),
    "v5p": Chip("tpu", 3, 95.74, 459, 2765e9, 180e9, 6.25e9, 1, 1.75, "TPU v5|TPU v5p"),
    "v4": Chip("tpu", 3, 15.25, 275, 1228e9, 90e9, 3.1e9, 2, 1.05, "TPU v4"),
    "v3": Chip("tpu", 2, 15.48, 123, 900e9, 140e9, 3.1e9, 2, 0.94),
    "tpu7x": Chip("tpu", 3, 94.75, 2307, 7380e9, 200e9, 12.5e9, 2, 0.0),
    "h100": Chip("gpu", 2, 72.77, 989, 3352e9, 450e9, 50e9, 1, 0.0, "NVIDIA H100|NVIDIA H200"),
}
"""By the first part of a topology's name. A line for each machine that can be planned for."""

OTHER_PEAKS = {
    "NVIDIA A100": 312,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GH200": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200 NVL": 835,
    "TPU7x": 1153.5,  # a device is one of the chip's two cores
}
"""Dense bfloat16 TFLOP/s of devices that no topology here consists of, by `device_kind`."""


def peak_tflops(device_kind: str) -> float:
    """Dense bfloat16 peak of a device by jax's `device_kind`; 0 where it is not known."""
    peaks = OTHER_PEAKS | {k: chip.tflops for chip in CHIPS.values() for k in chip.kinds.split("|")}
    matches = [kind for kind in peaks if kind and device_kind.startswith(kind)]
    return float(peaks[max(matches, key=len)]) if matches else 0.0
