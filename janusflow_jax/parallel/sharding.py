"""Meshes and sharding rules: where arrays live.

Model code constrains activations by axis names (`constrain`), which does nothing without a mesh. A
table of rules gives each parameter its PartitionSpec by its path. Axes that do not divide a
dimension are dropped, so the same table serves the test size and 1.3B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.config import MeshConfig
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
Device = Any  # jax.Device, or an object with the same attributes that stands for one in a test

# First match wins; the spec is for the last dimensions, a leading layer axis is never sharded.
RULES: tuple[tuple[str, P], ...] = (
    (r"llm/embedding$", P("tensor", "fsdp")),
    # Cut by vocabulary alone: the loss leaves it where it is (cross_entropy.py).
    (r"llm/head/kernel$", P(None, ("fsdp", "tensor"))),
    (r"attn/[qkv]/kernel$", P("fsdp", "tensor")),
    (r"llm/.*(attn/[qkv]|mlp/(gate|up))/bias$", P("tensor")),
    (r"attn/o/kernel$", P("tensor", "fsdp")),
    (r"mlp/(gate|up|fc1)/kernel$", P("fsdp", "tensor")),
    (r"mlp/(down|fc2)/kernel$", P("tensor", "fsdp")),
    # Adapters are small; only what meets a kernel's split over `tensor` is split like it.
    (r"(attn/[qkv]|mlp/(gate|up))/lora_b$", P(None, "tensor")),
    (r"(attn/o|mlp/down)/lora_a$", P("tensor", None)),
    (r"block_\d+/linear_1/kernel$", P("fsdp", "tensor")),
    (r"block_\d+/linear_2/kernel$", P("tensor", "fsdp")),
    (r"time_embed/linear_1/kernel$", P("fsdp", "tensor")),
    (r"time_embed/linear_2/kernel$", P("tensor", "fsdp")),
    # Column then row: the MLP's activations stay where they are.
    (r"repa_head/linear_0/kernel$", P("fsdp", "tensor")),
    (r"repa_head/linear_1/kernel$", P("tensor", "fsdp")),
    (r"(film|und_aligner|gen_aligner|gen_head|linear_\d)/kernel$", P("fsdp", None)),
    (r"pos_embedding$", P(None, "fsdp")),
    (r"patch_embed/kernel$", P("fsdp")),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """Builds the (data, fsdp, tensor) mesh.

    `data` is the outermost axis and spans the slices: only its collectives (gradients once a step)
    cross the slow network between slices. `tensor` is innermost: its devices are neighbors.

    Args:
      cfg: sizes; one of them may be -1: all remaining devices.
      devices: default: all of `jax.devices()`.
    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or do not divide over
        the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, physical = len(devices), len({_slice_of(d) for d in devices})
    slices = cfg.slices or physical
    if slices < 1 or count % slices or (physical > 1 and slices != physical):
        raise ConfigError(
            f"mesh.slices: cannot divide {count} devices, which are in {physical} slices, into "
            f"{cfg.slices}: set --config.mesh.slices=0 to use them as they are"
        )
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"mesh: expected sizes >= 1 and at most one -1; got {sizes}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != count:
        raise ConfigError(
            f"mesh: data x fsdp x tensor = {[cfg.data, cfg.fsdp, cfg.tensor]} does not use the "
            f"{count} devices there are; set --config.mesh.data, .fsdp and .tensor so that their "
            "product does"
        )
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh: data: expected a multiple of the {slices} slices (only data goes from slice "
            f"to slice); got {sizes[0]}: fsdp x tensor may be at most the {count // slices} "
            "devices of a slice"
        )
    return Mesh(_arrange(devices, sizes, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def _slice_of(device: Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _arrange(devices: Sequence[Device], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Devices as data x fsdp x tensor, with network neighbors next to each other."""
    cores = {getattr(d, "core_on_chip", 0) for d in devices}
    if devices[0].platform == "tpu" and len(cores) == 1:
        if len({_slice_of(d) for d in devices}) > 1:
            return mesh_utils.create_hybrid_device_mesh(
                (sizes[0] // slices, *sizes[1:]),
                (slices, 1, 1),
                devices=devices,
                allow_split_physical_axes=True,
            )
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # GPUs of a host are equally near, and mesh_utils rejects chips with two cores (v3, v4). This
    # order keeps the cores of a chip, the GPUs of a host and the chips of a slice together.
    order = sorted(
        devices,
        key=lambda d: (
            _slice_of(d),
            d.process_index,
            *getattr(d, "coords", ()),
            getattr(d, "core_on_chip", 0),
            d.id,
        ),
    )
    return np.asarray(order).reshape(sizes)


def check_rows(batch_rows: int, accum_steps: int, mesh: Mesh) -> None:
    """Raises ConfigError where the rows of a batch do not divide over the mesh."""
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * accum_steps
    if batch_rows % multiple:
        raise ConfigError(
            f"batch_rows: expected a multiple of data x fsdp x accum_steps = {multiple}; got "
            f"{batch_rows}: set --config.batch_rows, or use more tensor parallelism "
            "(--config.mesh.tensor)"
        )


def current_mesh() -> AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def num_devices() -> int:
    """Devices of the current mesh; 1 without a mesh."""
    mesh = current_mesh()
    return mesh.size if mesh is not None else 1


def axis_size(name: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def batch_size() -> int:
    """Devices over which rows are split; 1 without a mesh."""
    return axis_size("data") * axis_size("fsdp")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Requests a layout: 'batch' shards over data x fsdp, 'tensor' over tensor, None is whole.

    Axes that do not divide their dimension are dropped. Does nothing without a mesh.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = P(*[BATCH if n == "batch" else n for n in names])
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def fit(spec: P, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Drops the axes of `spec` that do not divide `shape`; pads it on the left to its rank."""
    entries = list(spec)[-len(shape) :] if len(shape) else []
    entries = [None] * (len(shape) - len(entries)) + entries
    fitted = []
    for entry, dim in zip(entries, shape, strict=True):
        axes = entry if isinstance(entry, tuple) else (entry,)
        size = math.prod(mesh.shape[a] for a in axes if a is not None)
        fitted.append(entry if dim % size == 0 else None)
    return P(*fitted)


def param_spec(name: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The PartitionSpec of a parameter by its path (or of a moment that mirrors it)."""
    name = re.sub(r"kernel/(qvalue|scale)$", "kernel", name)  # int8 weights
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return fit(spec, shape, mesh)
    return P()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters, or of optimizer state that mirrors parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path_name(path), x.shape, mesh)), tree
    )


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """NamedShardings that split the first axis of every array over data x fsdp."""
    return jax.tree.map(lambda x: NamedSharding(mesh, P(BATCH)), batch)


def rows_of_process(mesh: Mesh, global_rows: int) -> list[int]:
    """Rows of the batch (ascending) that this process's devices need.

    They follow from the sharding, not from the process number: if the tensor axis spans processes,
    several of them need the same rows.
    """
    indices = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((global_rows,))
    parts = (range(global_rows)[index[0]] for index in indices.values() if index is not None)
    return sorted({row for rows in parts for row in rows})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, global_rows: int) -> dict[str, jax.Array]:
    """Global arrays from this process's numpy rows: those of `rows_of_process` in order, or all
    `global_rows`."""
    where = NamedSharding(mesh, P(BATCH))
    shapes = {name: (global_rows, *x.shape[1:]) for name, x in batch.items()}
    return jax.make_array_from_process_local_data(where, batch, shapes)


def put_tree(tree: Any, shardings: Any) -> Any:
    """Global arrays from whole trees that every process has; each device gets only its part.

    Arrays that have their sharding already stay as they are.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)
