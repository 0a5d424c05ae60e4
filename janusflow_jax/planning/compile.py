"""The real train step, compiled for a machine that is not there.

No array exists: state and batch are shapes with the shardings that a run would have.
"""

from __future__ import annotations

import copy
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janusflow_jax import config as config_lib
from janusflow_jax.config import TrainConfig, checks as config_checks
from janusflow_jax.models import attention, janusflow, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import topology
from janusflow_jax.planning.topology import Machine
from janusflow_jax.training import step as train_step

QUICK = {
    "tpu": {"xla_jf_convolution_performance_target": "0.5"},  # accept slower convolution tilings
    "gpu": {"xla_gpu_enable_triton_gemm": False},  # tile sizes cannot be tried without a GPU
}
"""Compiler options that save time and change neither memory nor collectives."""


class Compiled(NamedTuple):
    """A program and what it was compiled from."""

    cfg: TrainConfig
    machine: Machine
    mesh: Mesh
    arguments: dict[str, Any]  # by name: trees of shapes with shardings
    program: jax.stages.Compiled | None  # None where it does not fit
    shortage: str  # the compiler's message where it does not fit
    seconds: float


def prepare(cfg: TrainConfig, machine: Machine) -> TrainConfig:
    """A copy of the config as it would run on the machine.

    Raises:
      ConfigError: it cannot run there; the message lists every reason.
    """
    cfg = copy.deepcopy(cfg)
    platform = machine.chip.platform
    config_lib.raise_problems(f"config {cfg.name!r}", config_checks.train_problems(cfg))
    attention.check_platform(cfg.attention, platform)
    cfg.attention = attention.implementation(cfg.attention, platform, cfg.data.row_len)
    return cfg


def batch_shapes(cfg: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as the loader makes it, without values.

    A source with a cache has latents to generate from, or features to understand; REPA's targets
    are computed.
    """
    rows, side, m = cfg.batch_rows, cfg.model.image_size, cfg.model
    cached = {source.task for source in cfg.data.sources if source.cache}
    needs_gen = "generate" not in cached or bool(cfg.loss.repa_weight)
    images = max(cfg.data.gen_slots * needs_gen, cfg.data.und_slots * ("understand" not in cached))
    slots, shape = cfg.data.num_slots, jax.ShapeDtypeStruct
    encoded = {}
    if "generate" in cached:
        latents = shape((rows, cfg.data.gen_slots, *m.latent_shape), jnp.bfloat16)
        encoded |= {"latent_mean": latents, "latent_logvar": latents}
    if "understand" in cached:
        features = (rows, cfg.data.und_slots, m.num_image_tokens, m.und.width)
        encoded["und_features"] = shape(features, jnp.bfloat16)
    if m.student.steps:
        encoded["unprompted_ids"] = shape((rows, cfg.data.row_len), jnp.int32)
    return encoded | {
        "row": shape((rows,), jnp.uint32),
        "tokens": shape((rows, cfg.data.row_len), jnp.int32),
        "segment_ids": shape((rows, cfg.data.row_len), jnp.int32),
        "positions": shape((rows, cfg.data.row_len), jnp.int32),
        "target_mask": shape((rows, cfg.data.row_len), jnp.bool_),
        "source_ids": shape((rows, cfg.data.row_len), jnp.int32),
        "images": shape((rows, images, side, side, 3), jnp.uint8),
        "slot_start": shape((rows, slots), jnp.int32),
        "slot_task": shape((rows, slots), jnp.int32),
    }


def state_shapes(cfg: TrainConfig) -> train_step.State:
    """A run's state without values."""
    return jax.eval_shape(
        lambda params, vae_params: train_step.create_state(cfg, params, vae_params),
        janusflow.param_shapes(cfg.model),
        vae.param_shapes(cfg.model.vae),
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the shardings of another tree."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def train(cfg: TrainConfig, machine: Machine, exact: bool = False) -> Compiled:
    """Compiles the train step of a config for a machine.

    Args: exact: see `build`.
    Raises:
      ConfigError: the config, the topology, the mesh or the number of rows cannot work.
    """
    cfg = prepare(cfg, machine)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(machine))
    sharding.check_rows(cfg.batch_rows, cfg.optim.accum_steps, mesh)
    state, batch = state_shapes(cfg), batch_shapes(cfg)
    state = with_shardings(state, train_step.state_shardings(state, mesh))
    batch = with_shardings(batch, sharding.batch_shardings(batch, mesh))
    with jax.set_mesh(mesh):
        attention.check_rows(cfg, machine.chip.platform)
        traced = train_step.jit_train_step(cfg, mesh, state, batch).trace(state, batch)
        built = build(traced, machine, exact)
    return Compiled(cfg, machine, mesh, {**state, "batch": batch}, *built)


def build(
    traced: jax.stages.Traced, machine: Machine, exact: bool = False
) -> tuple[jax.stages.Compiled | None, str, float]:
    """Compiles: (program, '', seconds), or (None, the compiler's message, seconds).

    Args:
      exact: on TPU, search for the best tiling of each convolution, as a run does. This takes
        much longer; memory and collectives do not depend on it.
    """
    start = time.perf_counter()
    options = {} if exact else QUICK[machine.chip.platform]
    try:
        program, shortage = traced.lower().compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = re.search(r"[^\n]*exceed[^\n]*", str(error))
        program, shortage = None, (line[0] if line else str(error).splitlines()[0]).strip()
    return program, shortage, time.perf_counter() - start


def required_bytes(shortage: str) -> int | None:
    """Bytes that a program would take on a device, from the compiler's message.

    libtpu calls its figure that of "HLO temporaries", but it includes the arguments: it is the
    peak of the same program where it fits (tests/test_plan_tpu.py).
    """
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", shortage)
    if not match:
        return None
    number, unit = (x for x in match.groups() if x)
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's part of a tree of shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
