"""The real train step, compiled for a machine that is not there.

No array exists: the state and the batch are shapes with shardings, the same that a run would have.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janusflow_jax import config as config_lib
from janusflow_jax.config import TrainConfig, checks as config_checks
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import topology as plan_topology
from janusflow_jax.planning.topology import Machine
from janusflow_jax.training import step as train_step

QUICK = {
    "tpu": {"xla_jf_convolution_performance_target": "0.5"},  # a tiling half as good as its bound
    "gpu": {"xla_gpu_enable_triton_gemm": False},  # without a card no tile sizes can be tried
}
"""Compiler options that leave a program's memory and collectives as they are."""


@dataclasses.dataclass
class Compiled:
    """A program, and what it was compiled from."""

    cfg: TrainConfig
    machine: Machine
    mesh: Mesh
    arguments: dict[str, Any]  # by name: trees of shapes with shardings
    program: Any  # jax.stages.Compiled; None where it does not fit
    lacks: str  # the compiler's words on what does not fit
    seconds: float


def prepare(cfg: TrainConfig, machine: Machine) -> TrainConfig:
    """The config as it would run there, checked.

    Raises:
      ConfigError: every reason why it cannot.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.attention == "auto":
        cfg.attention = "splash" if machine.chip.platform == "tpu" else "xla"
    kinds = {"splash": "tpu", "cudnn": "gpu"}
    bad = config_checks.train_problems(cfg)
    if kinds.get(cfg.attention, machine.chip.platform) != machine.chip.platform:
        bad.append(f"attention: {cfg.attention} is not for {machine.name}; use auto or xla")
    config_lib.raise_problems(f"config {cfg.name!r}", bad)
    return cfg


def make_mesh(cfg: TrainConfig, machine: Machine) -> Mesh:
    """The mesh that a run would make there.

    Raises:
      ConfigError: the mesh or the rows do not divide over its devices.
    """
    mesh = sharding.make_mesh(cfg.mesh, plan_topology.devices(machine))
    sharding.check_rows(cfg.batch_rows, cfg.optim.accum_steps, mesh)
    return mesh


def batch_shapes(cfg: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as the loader makes it, without its numbers."""
    rows, slots, side = cfg.batch_rows, cfg.data.num_slots, cfg.model.image_size
    shape = jax.ShapeDtypeStruct
    out = {n: shape((rows, cfg.data.row_len), jnp.int32) for n in ("tokens", "segment_ids")}
    return out | {
        "positions": shape((rows, cfg.data.row_len), jnp.int32),
        "target_mask": shape((rows, cfg.data.row_len), jnp.bool_),
        "row": shape((rows,), jnp.uint32),
        "images": shape((rows, slots, side, side, 3), jnp.uint8),
        "slot_start": shape((rows, slots), jnp.int32),
        "slot_task": shape((rows, slots), jnp.int32),
    }


def state_shapes(cfg: TrainConfig) -> train_step.State:
    """A run's state without its numbers."""
    return jax.eval_shape(
        lambda p, v: train_step.create_state(cfg, p, v),
        janusflow.param_shapes(cfg.model),
        vae.param_shapes(cfg.model.vae),
    )


def placed(tree: Any, where: Any) -> Any:
    """Shapes with the shardings `where`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def train(cfg: TrainConfig, machine: Machine, exact: bool = False) -> Compiled:
    """Compiles the train step of a config for a machine.

    Args: exact: see `build`.
    Raises:
      ConfigError: the config, the topology or the mesh cannot work.
    """
    cfg = prepare(cfg, machine)
    mesh = make_mesh(cfg, machine)
    state, batch = state_shapes(cfg), batch_shapes(cfg)
    state = placed(state, train_step.state_shardings(state, mesh))
    batch = placed(batch, sharding.batch_shardings(batch, mesh))
    with jax.set_mesh(mesh):
        traced = train_step.jit_train_step(cfg, mesh, state, batch).trace(state, batch)
        program, lacks, seconds = build(traced, machine, exact)
    return Compiled(cfg, machine, mesh, {**state, "batch": batch}, program, lacks, seconds)


def trace_counted(cfg: TrainConfig, mesh: Mesh) -> Any:
    """The step's jaxpr in the form that can be counted: attention by XLA."""
    cfg = dataclasses.replace(cfg, attention="xla")
    state, batch = state_shapes(cfg), batch_shapes(cfg)
    with jax.set_mesh(mesh):
        return train_step.jit_train_step(cfg, mesh, state, batch).trace(state, batch).jaxpr


def build(traced: Any, machine: Machine, exact: bool) -> tuple[Any, str, float]:
    """Compiles: (program, '', seconds), or (None, the compiler's words, seconds).

    Args:
      exact: for TPU, let the compiler seek long for the best tiling of each convolution, as a
      run does. Memory and collectives do not depend on it.
    """
    started = time.perf_counter()
    options = {} if exact else QUICK[machine.chip.platform]
    try:
        program, lacks = traced.lower().compile(compiler_options=options), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program, lacks = None, _shortage(str(error))
    return program, lacks, time.perf_counter() - started


def _shortage(message: str) -> str:
    """The part of XLA's message that says how much of what."""
    found = re.search(r"[^\n]*exceed[^\n]*", message)
    return (found[0] if found else message.splitlines()[0]).strip()


def needed(lacks: str) -> int | None:
    """Bytes of a device that a program would take, of the compiler's words on why it does not fit.

    libtpu calls this figure that of "HLO temporaries", but the arguments are in it: it is the
    peak that the same program has where it fits (tests/test_plan_tpu.py).
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", lacks)
    if not found:
        return None
    number, unit = (x for x in found.groups() if x)
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def peak_rss() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bytes_of(tree: Any) -> int:
    """Bytes of one device's part of a tree of shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
