"""Meshes and sharding rules: where arrays live.

Model code uses one helper, `constrain`, which does nothing without a mesh. A table of rules gives
each parameter its PartitionSpec by its path. Axes that do not divide a dimension are dropped, so
the same table serves the test size and 1.3B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.config import MeshConfig
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel.trees import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# First match wins; the spec is for the last dimensions, a leading layer axis is never sharded.
RULES: tuple[tuple[str, P], ...] = (
    (r"llm/embedding$", P("tensor", "fsdp")),
    # Cut by vocabulary alone: the loss leaves it where it is (cross_entropy.py).
    (r"llm/head/kernel$", P(None, ("fsdp", "tensor"))),
    (r"attn/[qkv]/kernel$", P("fsdp", "tensor")),
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


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
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
    slices = _num_slices(cfg, devices)
    sizes = _mesh_sizes(cfg, len(devices), slices)
    return Mesh(_arrange(devices, sizes, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _num_slices(cfg: MeshConfig, devices: Sequence[Any]) -> int:
    there = len({_slice_of(d) for d in devices})
    if cfg.slices < 0:
        raise ConfigError(
            f"mesh.slices: expected 0 (as many as there are) or more; got {cfg.slices}"
        )
    if there > 1 and cfg.slices not in (0, there):
        raise ConfigError(
            f"mesh.slices: the {len(devices)} devices are of {there} slices; got {cfg.slices}: "
            f"set --config.mesh.slices={there}, or 0 to take what is there"
        )
    return cfg.slices or there


def _mesh_sizes(cfg: MeshConfig, count: int, slices: int) -> list[int]:
    """(data, fsdp, tensor) with -1 replaced."""
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"mesh: expected sizes >= 1 and at most one -1; got {sizes}")
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    bad = []
    if int(np.prod([abs(s) for s in sizes])) != count or -1 in sizes:
        bad.append(
            f"data x fsdp x tensor = {sizes} does not use the {count} devices there are; set "
            "--config.mesh.data, .fsdp and .tensor so that their product does"
        )
    if count % slices:
        bad.append(f"slices: {count} devices do not fall into {slices} slices of one size")
    elif sizes[0] != -1 and sizes[0] % slices:
        bad.append(
            f"data: expected a multiple of the {slices} slices (only data goes from slice to "
            f"slice); got {sizes[0]}: fsdp x tensor may be at most the {count // slices} devices "
            "of a slice"
        )
    if bad:
        raise ConfigError("; ".join(f"mesh: {b}" for b in bad))
    return sizes


def _arrange(devices: Sequence[Any], sizes: Sequence[int], slices: int) -> np.ndarray:
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


def row_multiple(mesh: Any, accum_steps: int) -> int:
    """What a batch's number of rows must be a multiple of: data x fsdp x accum_steps."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * accum_steps


def check_rows(batch_rows: int, accum_steps: int, mesh: Any) -> None:
    """Raises ConfigError where the rows of a batch do not divide over the mesh."""
    multiple = row_multiple(mesh, accum_steps)
    if batch_rows % multiple:
        raise ConfigError(
            f"batch_rows: expected a multiple of data x fsdp x accum_steps = {multiple}; got "
            f"{batch_rows}: set --config.batch_rows, or use more tensor parallelism "
            "(--config.mesh.tensor)"
        )


def current_mesh() -> Any | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def num_devices() -> int:
    """Devices of the current mesh; 1 without a mesh."""
    mesh = current_mesh()
    return mesh.size if mesh is not None else 1


def axis_size(name: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    mesh = current_mesh()
    return mesh.shape[name] if mesh is not None else 1


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


def fit(spec: P, shape: Sequence[int], mesh: Any) -> P:
    """Drops the axes of `spec` that do not divide `shape`; pads it on the left to its rank."""
    entries = list(spec)[-len(shape) :] if len(shape) else []
    entries = [None] * (len(shape) - len(entries)) + entries

    def keep(entry: Any, dim: int) -> Any:
        axes = () if entry is None else (entry if isinstance(entry, tuple) else (entry,))
        size = int(np.prod([mesh.shape[a] for a in axes])) if axes else 1
        return entry if axes and dim % size == 0 else None

    return P(*[keep(e, d) for e, d in zip(entries, shape, strict=True)])


def param_spec(name: str, shape: Sequence[int], mesh: Any) -> P:
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


def put_batch(batch: Any, mesh: Mesh, global_rows: int) -> Any:
    """Global arrays from this process's numpy rows: those of `rows_of_process` in order, or all
    `global_rows`."""
    sharding = NamedSharding(mesh, P(BATCH))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    rows = rows_of_process(mesh, global_rows)

    def put(x: np.ndarray) -> jax.Array:
        mine = range(global_rows) if len(x) == global_rows else rows

        def part(index: Any) -> np.ndarray:  # a device's rows follow one another
            start, stop, _ = index[0].indices(global_rows)
            first = mine.index(start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((global_rows, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def put_tree(tree: Any, where: Any) -> Any:
    """Global arrays from whole trees that every process has; each device gets only its part."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, where)
