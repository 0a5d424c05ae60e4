"""A run's state: from whole trees onto the devices, or out of its newest checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janusflow_jax.checkpoints import run as run_checkpoints
from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.training import step as train_step


def make(cfg: TrainConfig, mesh: Any, params: Any, vae_params: Any) -> Any:
    """The sharded start state, from whole trees that every process has."""
    if cfg.frozen_dtype != "float32":  # on the host: a device may not hold both
        train, frozen = trees.split(params, parts_lib.trained_paths(cfg))
        params = trees.merge(train, _cast(frozen, cfg.frozen_dtype))
        vae_params = _cast(vae_params, cfg.frozen_dtype)
    create = lambda p, v: train_step.create_state(cfg, p, v)  # noqa: E731
    where = train_step.state_shardings(jax.eval_shape(create, params, vae_params), mesh)
    given = (params, vae_params)
    given = sharding.put_tree(given, sharding.tree_shardings(given, mesh))
    return jax.jit(create, out_shardings=where)(*given)


def to_save(state: Any, apart: bool) -> Any:
    """The parameters that a checkpoint holds: all; `apart`: the trained and the adapters only,
    because the run's `base/` has the rest, which never changes."""
    frozen = trees.flatten(state["frozen"]) if apart else {}
    scales = trees.unflatten({n: x for n, x in frozen.items() if parts_lib.is_lora_path(n)})
    return trees.merge(scales if apart else state["frozen"], state["params"])


def restore(
    ckpts: run_checkpoints.RunCheckpoints, state: Any, apart: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The newest whole checkpoint put into `state`, and its `run.json`; without one ({} then)
    the state as it is.

    Args: apart: as the run saves (`to_save`).
    """
    whole = {**state, "params": to_save(state, apart)}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {n: whole[n] for n in train_step.SAVED},
    )
    found = ckpts.restore_newest(abstract)
    if found is None:
        return state, {}
    got, run = found
    got["params"], frozen = trees.split(got["params"], trees.flatten(state["params"]))
    got["frozen"] = trees.merge(state["frozen"], frozen)
    counters = {n: np.int32(run[n]) for n in ("step", "bad_steps")}
    where = {n: state[n].sharding for n in counters}
    return {**state, **got, **sharding.put_tree(counters, where)}, run


def begun_with(cfg: TrainConfig, params: Any) -> Any:
    """What a run's `base/` holds of its start, so that checkpoints need not repeat it: everything
    where adapters train, in the types that the run holds it in; None for other runs."""
    if not cfg.lora.rank:
        return None
    train, frozen = trees.split(params, parts_lib.trained_paths(cfg))
    return trees.merge(_cast(frozen, cfg.frozen_dtype), train)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tree)
