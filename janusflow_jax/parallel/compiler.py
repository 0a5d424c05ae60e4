"""Options of XLA's compilers that make the train step faster, by platform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax.parallel import processes

OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {
        # Gathers of parameters run beside the layer before. v5e's compiler does it by itself.
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        # Sums of gradients over `data` run beside the backward pass. XLA would combine those of a
        # layer into one at the layer's end, where nothing is left to run beside it.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_jf_crs_combiner_threshold_in_bytes": 1_000_000,
    },
    "gpu": {
        # Gathers of a layer start while the layer before it runs, reductions end beside the next.
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
}


def options(mesh: Mesh) -> dict[str, Any]:
    """Those of the mesh's platform that its compiler knows; a warning names the others."""
    known = {}
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    for name, value in OPTIONS.get(mesh.devices.flat[0].platform, {}).items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(number).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            processes.log(f"WARNING: the compiler has no option {name}; a step may take longer")
        else:
            known[name] = value
    return known
