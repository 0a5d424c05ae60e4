"""A run's state: from whole trees onto the devices, or out of its newest checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janusflow_jax import run_checkpoints, sharding, train_step, trees
from janusflow_jax.config import TrainConfig


def make(cfg: TrainConfig, mesh: Any, params: Any, vae_params: Any) -> Any:
    """The sharded start state, from whole trees that every process has."""
    if cfg.frozen_dtype != "float32":  # on the host: a device may not hold both
        train, frozen = trees.split(params, train_step.trained_paths(cfg))
        params = trees.merge(train, _cast(frozen, cfg.frozen_dtype))
        vae_params = _cast(vae_params, cfg.frozen_dtype)
    create = lambda p, v: train_step.create_state(cfg, p, v)  # noqa: E731
    where = train_step.state_shardings(jax.eval_shape(create, params, vae_params), mesh)
    given = (params, vae_params)
    given = sharding.put_tree(given, sharding.tree_shardings(given, mesh))
    return jax.jit(create, out_shardings=where)(*given)


def restore(ckpts: run_checkpoints.RunCheckpoints, state: Any) -> tuple[Any, dict[str, Any]]:
    """The newest whole checkpoint put into `state`, and its `run.json`; without one ({} then)
    the state as it is."""
    whole = {**state, "params": trees.merge(state["frozen"], state["params"])}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {n: whole[n] for n in train_step.SAVED},
    )
    found = ckpts.restore_newest(abstract)
    if found is None:
        return state, {}
    got, run = found
    got["params"], got["frozen"] = trees.split(got["params"], trees.flat(state["params"]))
    counters = {n: np.int32(run[n]) for n in ("step", "bad_steps")}
    where = {n: state[n].sharding for n in counters}
    return {**state, **got, **sharding.put_tree(counters, where)}, run


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tree)
