"""One optimizer step: pure functions of (state, batch), jitted and sharded by the caller.

The state is a plain dict: `params` (trained parts), `frozen` (the rest), `vae`, `ema` (of the
trained parts), `opt_state`, `step` int32 (steps so far), `bad_steps` int32 (skipped updates),
`mean_norm` float32 (running mean of the gradient norm; 0: not known yet); of a student's run also
`teacher` (the trained parts as they were at the start).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from janusflow_jax.config import OptimConfig, TrainConfig, parts as parts_lib
from janusflow_jax.models import attention, janusflow, lora
from janusflow_jax.parallel import compiler, numerics, sharding, trees
from janusflow_jax.training import losses, optim

State = dict[str, Any]
Metrics = dict[str, Any]
SAVED = ("params", "ema", "opt_state")
MEAN_STEPS = 100
"""Steps of the running mean of the gradient norm; before that many, no norm is a spike."""


def make_model(cfg: TrainConfig) -> janusflow.JanusFlow:
    """The model with the numerics of this run."""
    impl = attention.implementation(cfg.attention, jax.default_backend(), cfg.data.row_len)
    return janusflow.JanusFlow(cfg.model, jnp.dtype(cfg.dtype), cfg.remat, impl, cfg.scan_layers)


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
        **({"teacher": teacher_of(cfg, train)} if cfg.distills else {}),
        "ema": jax.tree.map(jnp.copy, train) if cfg.optim.ema else {},
        "opt_state": optim.make_optimizer(cfg.optim, cfg.num_steps).init(train),
        "step": jnp.int32(0),
        "bad_steps": jnp.int32(0),
        "mean_norm": jnp.float32(0),
    }


def teacher_of(cfg: TrainConfig, train: Any) -> Any:
    """What a student trains, as its teacher keeps it: without adapters, which start at zero."""
    leaves = trees.flatten(train).items()
    return trees.unflatten(
        {n: jnp.array(x, cfg.frozen_dtype) for n, x in leaves if not parts_lib.is_lora_path(n)}
    )


def state_shardings(state: State, mesh: Mesh) -> State:
    """Shardings of a state: moments and EMA like their parameters, counters replicated."""
    return sharding.tree_shardings(state, mesh)


def source_shares(cfg: TrainConfig, step: Array | int) -> Float[Array, " S"]:
    """Each source's share of the mixture's positions at a step."""
    shares = jnp.zeros(len(cfg.data.sources))
    for first_row, weights in cfg.data.phases():
        phase = jnp.array(weights, jnp.float32) / sum(weights)
        first_step = -(-cfg.data.position_of(first_row) // cfg.batch_rows)
        shares = jnp.where(step >= first_step, phase, shares)
    return shares


def make_train_step(cfg: TrainConfig) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The pure step (state, batch) -> (state, metrics)."""
    model = make_model(cfg)
    optimizer = optim.make_optimizer(cfg.optim, cfg.num_steps)
    lr = optim.schedule(cfg.optim, cfg.num_steps)
    num_gen, num_und = cfg.data.gen_slots, cfg.data.und_slots
    generates = [source.task == "generate" for source in cfg.data.sources]
    # None would undo the process's own choice (JAX_DEFAULT_MATMUL_PRECISION).
    precision = contextlib.nullcontext()
    if cfg.matmul_precision:
        precision = jax.default_matmul_precision(cfg.matmul_precision)

    def loss_fn(params: Any, state: State, batch: Any, weights: Any) -> tuple[Any, Any]:
        # The key is made inside: a step that is compiled ahead of time has no device for it.
        draws = losses.draw(numerics.key(cfg.seed), batch, cfg.model, cfg.loss, num_gen)
        with precision:
            sums, extras = losses.loss_sums(
                trees.merge(state["frozen"], params),
                state["vae"],
                batch,
                draws,
                model=model,
                loss=cfg.loss,
                num_gen=num_gen,
                num_und=num_und,
                source_weights=weights,
                teacher=trees.merge(state["frozen"], state["teacher"]) if cfg.distills else None,
            )
        extras.pop("velocity", None)
        return sum(sums.values()), extras

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        totals = losses.counts(batch, num_gen, len(generates))
        weights = losses.weights(cfg.loss, totals, source_shares(cfg, state["step"]), generates)

        def gradient(part: Any) -> Any:
            loss_and_gradient = jax.value_and_grad(loss_fn, has_aux=True)
            return loss_and_gradient(state["params"], state, part, weights)

        (loss, extras), grads = accumulate(gradient, batch, cfg.optim.accum_steps)
        norm = optax.tree.norm(grads)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        new: State = {"params": params, "opt_state": opt_state}
        if cfg.optim.ema:
            with jax.named_scope("ema"):
                new["ema"] = optim.update_ema(
                    state["ema"], new["params"], cfg.optim.ema, state["step"]
                )

        # A step with a non-finite loss or gradient, or a spike, changes the counters only.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        limit = largest_norm(cfg.optim, state)
        ok = finite & (norm <= limit)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, {n: state[n] for n in new})
        bad_steps = state["bad_steps"] + (1 - ok.astype(jnp.int32))
        mean = update_mean_norm(state, jnp.minimum(norm, limit))
        counters = {
            "step": state["step"] + 1,
            "bad_steps": bad_steps,
            "mean_norm": jnp.where(finite, mean, state["mean_norm"]),
        }
        rate = lr(state["step"] - state["bad_steps"])  # the optimizer counts its updates
        metrics = {"loss": loss, "grad_norm": norm, "ok": ok, "lr": rate}
        metrics |= {"bad_steps": bad_steps, "mean_grad_norm": state["mean_norm"]}
        metrics |= _task_metrics(cfg, totals, extras)
        metrics |= {f"grad_norm/{part}": optax.tree.norm(g) for part, g in grads.items()}
        return {**state, **new, **counters}, metrics

    return step


def largest_norm(cfg: OptimConfig, state: State) -> Float[Array, ""]:
    """The gradient norm above which a step is skipped."""
    if not cfg.max_norm_ratio:
        return jnp.float32(jnp.inf)
    is_known = (state["step"] >= MEAN_STEPS) & (state["mean_norm"] > 0)
    return jnp.where(is_known, cfg.max_norm_ratio * state["mean_norm"], jnp.inf)


def update_mean_norm(state: State, norm: Float[Array, ""]) -> Float[Array, ""]:
    """The running mean of the gradient norm after a step."""
    mean = state["mean_norm"]
    updated = mean + (norm - mean) / (jnp.minimum(state["step"], MEAN_STEPS - 1) + 1)
    return jnp.where(mean > 0, updated, norm)  # a run of an older version has no mean


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


def _task_metrics(cfg: TrainConfig, totals: losses.Sums, extras: dict[str, Any]) -> Metrics:
    """Mean losses, and what they are means of: of each task, of each source, and of the flow by
    quarter of time."""
    sums = extras["by_source"]
    out = {f"loss_{n}": jnp.sum(sums[n]) / jnp.maximum(jnp.sum(totals[n]), 1.0) for n in sums}
    out |= {f"count_{n}": jnp.sum(totals[n]) for n in ("ar", "rf")}
    for i, source in enumerate(cfg.data.sources):
        names = ("rf", "repa") if source.task == "generate" else ("ar",)
        total = totals[names[0]][i]
        out[f"count_{names[0]}/{source.label}"] = total
        for name in names:
            out[f"loss_{name}/{source.label}"] = sums[name][i] / jnp.maximum(total, 1.0)
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
        compiler_options=compiler.options(mesh),
    )
