"""Meshes: slices outermost, neighbors innermost, and a message for sizes that do not fit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` looks at, of a device that does not exist."""

    id: int
    platform: str = "tpu"
    slice_index: int = 0
    process_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"


def grid(slices: int, cores: int = 1, kind: str = "TPU v5 lite") -> list[Chip]:
    """4 x 4 chips a slice."""
    places = [
        (s, y, x, i)
        for s in range(slices)
        for y in range(4)
        for x in range(4)
        for i in range(cores)
    ]
    return [
        Chip(n, "tpu", s, 4 * s + 2 * (y // 2) + x // 2, (x, y, 0), i, kind)
        for n, (s, y, x, i) in enumerate(places)
    ]


def arranged(devices: list, sizes: list[int], slices: int = 1) -> np.ndarray:
    return sharding._arrange(devices, sizes, slices)


def test_only_data_goes_from_slice_to_slice():
    mesh = arranged(grid(2), [8, 4, 1], 2)
    slices = np.vectorize(lambda d: d.slice_index)(mesh)
    assert mesh.shape == (8, 4, 1)
    assert (slices[:4] == 0).all() and (slices[4:] == 1).all()


def test_one_slice_may_split_its_axes():
    mesh = arranged(grid(1), [1, 8, 2])
    assert mesh.shape == (1, 8, 2) and len(set(mesh.ravel())) == 16
    for pair in mesh.reshape(-1, 2):  # tensor: neighbors in the grid
        (x, y, _), (v, w, _) = (d.coords for d in pair)
        assert min(abs(x - v), 4 - abs(x - v)) + min(abs(y - w), 4 - abs(y - w)) == 1


def test_the_cores_of_a_chip_stay_together():
    mesh = arranged(grid(1, cores=2, kind="TPU v4"), [4, 4, 2])
    for pair in mesh.reshape(-1, 2):
        assert pair[0].coords == pair[1].coords and pair[0].core_on_chip != pair[1].core_on_chip


def test_the_gpus_of_a_host_stay_together():
    gpus = [Chip(n, "gpu", 0, n // 8) for n in range(32)]
    mesh = arranged(gpus[::-1], [4, 8, 1])
    hosts = np.vectorize(lambda d: d.process_index)(mesh)
    assert (hosts == np.arange(4)[:, None, None]).all()


def test_the_sizes_of_a_mesh():
    make = lambda **sizes: sharding.make_mesh(c.MeshConfig(**sizes))  # noqa: E731
    assert dict(make().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make(fsdp=2, tensor=2, slices=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"\[-1, 3, 1\] does not use the 8 devices"),
        ({"data": 4}, r"\[4, 1, 1\] does not use the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"fsdp": 0}, "sizes >= 1"),
        ({"fsdp": 8, "slices": 2}, "multiple of the 2 slices.*got 1.*at most the 4 devices"),
        ({"slices": 3}, "8 devices.*into 3"),
        ({"slices": -1}, "into -1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(c.ConfigError, match=message):
        sharding.make_mesh(c.MeshConfig(**sizes))


def test_slices_that_the_devices_do_not_have():
    with pytest.raises(c.ConfigError, match=r"32 devices.* in 2 slices, into 4: .*slices=0"):
        sharding.make_mesh(c.MeshConfig(slices=4), grid(2))


def test_an_old_config_has_no_slices():
    assert c.from_dict(c.MeshConfig, {"data": 2, "fsdp": 4, "tensor": 1}).slices == 0
    assert jax.device_count() == 8
