"""One optimizer step: pure functions of (state, batch), jitted and sharded by the caller.

State is a plain dict: `params` (trained parts), `frozen` (the rest), `vae`, `ema` (of the trained
parts), `opt_state`, `step` int32 (optimizer steps tried), `bad_steps` int32 (updates skipped).
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
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.training import losses, optim

State = dict[str, Any]
SAVED = ("params", "ema", "opt_state")


def make_model(cfg: TrainConfig) -> janusflow.JanusFlow:
    """The model as this run computes it."""
    impl = attention.implementation(cfg.attention, jax.default_backend())
    return janusflow.JanusFlow(cfg.model, jnp.dtype(cfg.dtype), cfg.remat, impl)


def create_state(cfg: TrainConfig, params: Any, vae_params: Any) -> State:
    """Puts whole parameter trees into a fresh state. Traceable: jit it with out_shardings.

    Adapters (`cfg.lora`) are added, what is frozen takes `cfg.frozen_dtype`.
    """
    if cfg.lora.rank:
        params = {**params, "llm": lora.add(params["llm"], cfg.lora, jax.random.key(cfg.seed))}
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
    """Where everything lives: moments and EMA beside their parameters; counters everywhere."""
    return sharding.tree_shardings(state, mesh)


def task_shares(cfg: TrainConfig, step: Array | int) -> dict[str, Any]:
    """Each task's share of the mixture's positions at a step (for `loss.norm = per_sample`)."""
    gen: Any = 0.0
    for first_row, weights in cfg.data.phases():
        made = sum(
            w for w, s in zip(weights, cfg.data.sources, strict=True) if s.task == "generate"
        )
        gen = jnp.where(step >= -(-first_row // cfg.batch_rows), made / sum(weights), gen)
    return {"ar": 1 - gen, "rf": gen, "repa": gen}


def make_train_step(cfg: TrainConfig) -> Callable[[State, Any], tuple[State, dict[str, Any]]]:
    """Builds the pure step. Gradient accumulation splits the rows and keeps sums exact."""
    model = make_model(cfg)
    tx = optim.make_optimizer(cfg.optim, cfg.num_steps)
    accum = cfg.optim.accum_steps
    num_gen, num_und = cfg.data.gen_slots, cfg.data.und_slots
    lr = optim.schedule(cfg.optim, cfg.num_steps)

    def loss_fn(train: Any, state: State, batch: Any, weight: Any) -> tuple[Any, Any]:
        key = jax.random.key(cfg.seed)  # here: a step compiled ahead has no device to make it on
        draws = losses.draw(key, batch, cfg.model, cfg.loss, num_gen)
        sums, extras = losses.loss_sums(
            trees.merge(state["frozen"], train),
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

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(state: State, batch: Any, weight: Any) -> Any:
        if accum == 1:
            return grad_fn(state["params"], state, batch, weight)
        # Row r goes to part r % accum, so that every device keeps rows of its own in each part.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accum, *x.shape[1:]), 1, 0), batch
        )
        shapes = jax.eval_shape(
            lambda: grad_fn(state["params"], state, jax.tree.map(lambda x: x[0], parts), weight)
        )
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(total: Any, part: Any) -> tuple[Any, None]:
            new = grad_fn(state["params"], state, part, weight)
            return jax.tree.map(jnp.add, total, new), None

        return jax.lax.scan(body, zero, parts)[0]

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        totals = losses.counts(batch, num_gen)
        weight = losses.weights(cfg.loss, totals, task_shares(cfg, state["step"]))
        (loss, (sums, extras)), grads = accumulate(state, batch, weight)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new: State = {"params": params, "opt_state": opt_state}
        if cfg.optim.ema:
            new["ema"] = optim.update_ema(state["ema"], new["params"], cfg.optim.ema, state["step"])
        # A non-finite step changes nothing but the counters.
        new = {
            n: jax.tree.map(lambda a, b: jnp.where(ok, a, b), v, state[n]) for n, v in new.items()
        }
        bad = state["bad_steps"] + (1 - ok.astype(jnp.int32))
        new = {**state, **new, "step": state["step"] + 1, "bad_steps": bad}
        metrics = {f"loss_{n}": sums[n] / jnp.maximum(totals[n], 1.0) for n in losses.TASKS}
        metrics |= {f"count_{n}": totals[n] for n in ("ar", "rf")}
        metrics |= {"loss": loss, "grad_norm": norm, "ok": ok, "lr": lr(state["step"])}
        metrics["bad_steps"] = bad
        metrics |= {f"grad_norm/{k}": optax.tree.norm(v) for k, v in grads.items()}
        for i in range(losses.T_BUCKETS if "rf_by_t" in extras else 0):
            metrics[f"loss_rf/t{i}"] = extras["rf_by_t"][i] / jnp.maximum(
                extras["count_by_t"][i], 1.0
            )
        return new, metrics

    return step


def jit_train_step(cfg: TrainConfig, mesh: Mesh, state: State, batch: Any) -> Any:
    """The step compiled for a mesh; the state's buffers are donated.

    Args: state, batch: arrays or ShapeDtypeStructs, for their structure.
    """
    where = state_shardings(state, mesh)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        make_train_step(cfg),
        in_shardings=(where, sharding.batch_shardings(batch, mesh)),
        out_shardings=(where, replicated),
        donate_argnums=0,
    )
