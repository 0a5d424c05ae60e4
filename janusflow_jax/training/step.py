"""One optimizer step: pure functions of (state, batch), jitted and sharded by the caller.

The state is a plain dict: `params` (trained parts), `frozen` (the rest), `vae`, `ema` (of the
trained parts), `opt_state`, `step` int32 (steps so far), `bad_steps` int32 (skipped updates).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from janusflow_jax.config import TrainConfig, parts as parts_lib
from janusflow_jax.models import attention, janusflow, lora
from janusflow_jax.parallel import numerics, sharding, trees
from janusflow_jax.training import losses, optim

State = dict[str, Any]
Metrics = dict[str, Any]
SAVED = ("params", "ema", "opt_state")


def make_model(cfg: TrainConfig) -> janusflow.JanusFlow:
    """The model with the numerics of this run."""
    impl = attention.implementation(cfg.attention, jax.default_backend())
    return janusflow.JanusFlow(cfg.model, jnp.dtype(cfg.dtype), cfg.remat, impl)


def create_state(cfg: TrainConfig, params: Any, vae_params: Any) -> State:
    """A fresh state from whole parameter trees. Traceable: jit it with out_shardings.

    Adds the adapters of `cfg.lora`; frozen parts get the type `cfg.frozen_dtype`.
    """
    if cfg.lora.rank:
        params = {**params, "llm": lora.add(params["llm"], cfg.lora, numerics.key(cfg.seed))}
    train, frozen = trees.split(params, parts_lib.trained_paths(cfg))
    frozen, vae_params = (
        jax.tree.map(lambda x: x.astype(cfg.frozen_dtype), t) for t in (frozen, vae_params)
    )
    return {
        "params": train,
        "frozen": frozen,
        "vae": vae_params,
        "ema": jax.tree.map(jnp.copy, train) if cfg.optim.ema else {},
        "opt_state": optim.make_optimizer(cfg.optim, cfg.num_steps).init(train),
        "step": jnp.int32(0),
        "bad_steps": jnp.int32(0),
    }


def state_shardings(state: State, mesh: Mesh) -> State:
    """Shardings of a state: moments and EMA like their parameters, counters replicated."""
    return sharding.tree_shardings(state, mesh)


def task_shares(cfg: TrainConfig, step: Array | int) -> dict[str, Any]:
    """Each task's share of the mixture's positions at a step (for `loss.norm = per_sample`)."""
    gen: Any = 0.0
    for first_row, weights in cfg.data.phases():
        generate = sum(
            w for w, s in zip(weights, cfg.data.sources, strict=True) if s.task == "generate"
        )
        gen = jnp.where(step >= -(-first_row // cfg.batch_rows), generate / sum(weights), gen)
    return {"ar": 1 - gen, "rf": gen, "repa": gen}


def make_train_step(cfg: TrainConfig) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The pure step (state, batch) -> (state, metrics)."""
    model = make_model(cfg)
    optimizer = optim.make_optimizer(cfg.optim, cfg.num_steps)
    lr = optim.schedule(cfg.optim, cfg.num_steps)
    num_gen, num_und = cfg.data.gen_slots, cfg.data.und_slots

    def loss_fn(params: Any, state: State, batch: Any, weight: Any) -> tuple[Any, Any]:
        # The key is made inside: a step that is compiled ahead of time has no device for it.
        draws = losses.draw(numerics.key(cfg.seed), batch, cfg.model, cfg.loss, num_gen)
        sums, extras = losses.loss_sums(
            trees.merge(state["frozen"], params),
            state["vae"],
            batch,
            draws,
            model=model,
            loss=cfg.loss,
            num_gen=num_gen,
            num_und=num_und,
        )
        extras.pop("velocity", None)
        return sum(weight[n] * sums[n] for n in losses.TASKS), (sums, extras)

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        totals = losses.counts(batch, num_gen)
        weight = losses.weights(cfg.loss, totals, task_shares(cfg, state["step"]))

        def gradient(part: Any) -> Any:
            loss_and_gradient = jax.value_and_grad(loss_fn, has_aux=True)
            return loss_and_gradient(state["params"], state, part, weight)

        (loss, (sums, extras)), grads = accumulate(gradient, batch, cfg.optim.accum_steps)
        norm = optax.tree.norm(grads)

        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new: State = {"params": params, "opt_state": opt_state}
        if cfg.optim.ema:
            new["ema"] = optim.update_ema(state["ema"], new["params"], cfg.optim.ema, state["step"])

        # A step with a non-finite loss or gradient changes the counters only.
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, {n: state[n] for n in new})
        bad_steps = state["bad_steps"] + (1 - ok.astype(jnp.int32))
        metrics = {"loss": loss, "grad_norm": norm, "ok": ok, "lr": lr(state["step"])}
        metrics |= {"bad_steps": bad_steps, **_task_metrics(sums, totals, extras)}
        metrics |= {f"grad_norm/{part}": optax.tree.norm(g) for part, g in grads.items()}
        return {**state, **new, "step": state["step"] + 1, "bad_steps": bad_steps}, metrics

    return step


def accumulate(gradient: Callable[[Any], Any], batch: Any, num_parts: int) -> Any:
    """The sum of `gradient(part)` over parts of a batch, which are processed one after another."""
    if num_parts == 1:
        return gradient(batch)
    # Row r goes to part r % num_parts, so that every device has rows of its own in each part.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0), batch
    )
    shapes = jax.eval_shape(lambda: gradient(jax.tree.map(lambda x: x[0], parts)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _task_metrics(sums: losses.Sums, totals: losses.Sums, extras: dict[str, Array]) -> Metrics:
    """Mean loss of each task, what it is a mean of, and the flow loss by quarter of time."""
    out = {f"loss_{n}": sums[n] / jnp.maximum(totals[n], 1.0) for n in losses.TASKS}
    out |= {f"count_{n}": totals[n] for n in ("ar", "rf")}
    if "rf_by_t" in extras:
        by_t = extras["rf_by_t"] / jnp.maximum(extras["count_by_t"], 1.0)
        out |= {f"loss_rf/t{i}": by_t[i] for i in range(losses.T_BUCKETS)}
    return out


def jit_train_step(cfg: TrainConfig, mesh: Mesh, state: State, batch: Any) -> Any:
    """The step, compiled for a mesh. It donates the buffers of the state.

    Args:
      state, batch: arrays or ShapeDtypeStructs, for their structure.
    """
    where = state_shardings(state, mesh)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        make_train_step(cfg),
        in_shardings=(where, sharding.batch_shardings(batch, mesh)),
        out_shardings=(where, replicated),
        donate_argnums=0,
    )
