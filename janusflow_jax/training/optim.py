"""The optimizer: AdamW or Muon with clipping and warm-up, by optax; EMA.

A frozen part is an argument of the step, not a masked gradient: it gets no gradient and takes no
optimizer memory.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from janusflow_jax.config import OptimConfig, from_dict
from janusflow_jax.parallel import trees

Tree = dict[str, Any]


def schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, then (if decay_steps) linear to 0 at the last step.

    A decay that is longer than what the warm-up leaves takes that.
    """
    parts = [
        optax.linear_schedule(cfg.lr / max(cfg.warmup_steps, 1), cfg.lr, cfg.warmup_steps),
        optax.constant_schedule(cfg.lr),
    ]
    bounds = [cfg.warmup_steps]
    decay_steps = min(cfg.decay_steps, max(num_steps - cfg.warmup_steps, 0))
    if decay_steps:
        parts.append(optax.linear_schedule(cfg.lr, 0.0, decay_steps))
        bounds.append(num_steps - decay_steps)
    return optax.join_schedules(parts, bounds)


def rates_at_resume(run: dict[str, Any], cfg: OptimConfig, num_steps: int) -> tuple[float, float]:
    """The learning rate of the step after a checkpoint: by the old config, and by the new one.

    Where the old decay has ended, the first is that of the last step.

    Args:
      run: the checkpoint's `run.json`.
      cfg, num_steps: of the new config.
    """
    step, then = run["step"], from_dict(OptimConfig, run["config"]["optim"])
    before, now = schedule(then, run["config"]["num_steps"]), schedule(cfg, num_steps)
    rates = [float(jnp.asarray(rate)) for rate in (before(step), before(step - 1), now(step))]
    return rates[0] or rates[1], rates[2]


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (unless `clip_norm` is 0), then AdamW or Muon.

    Muon updates the kernels inside the parts. AdamW updates embeddings, the head of the LLM,
    depthwise kernels, norms and biases at the same rate: `consistent_rms` gives both updates the
    same size.
    """
    rate = schedule(cfg, num_steps)
    if cfg.name == "muon":
        update = contrib.muon(
            rate,
            consistent_rms=1.0,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            adam_weight_decay=cfg.weight_decay,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=cast(Any, muon_dimensions),
        )
    else:
        update = optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
        if cfg.moments_dtype != "float32":
            update = stored_as(update, cfg.moments_dtype)
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(clip, update)


def stored_as(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """The same optimizer with its moments stored in `dtype` between steps, rounded to nearest.

    A moment that changes by less than half of bfloat16's last bit (2^-9 of it) does not change. At
    b2 = 0.95 that happens where squared gradients stay within 4 % of their average, which is 2 % of
    the size of a step; at 0.999 they would have to triple. optax's `mu_dtype` covers the first
    moment only.
    """

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params: Any) -> Any:
        return cast(tx.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(new, dtype)

    return optax.GradientTransformation(init, update)


def muon_dimensions(params: Tree) -> Tree:
    """Input and output axes of every parameter that Muon updates; None for the others."""

    def dimensions(path: Any, x: Any) -> contrib.MuonDimensionNumbers | None:
        name = trees.path_name(path)
        if not name.endswith("kernel") or name.endswith("llm/head/kernel") or x.ndim < 2:
            return None
        if x.ndim == 4:  # convolution: (height, width, inputs) to outputs; not if depthwise
            return contrib.MuonDimensionNumbers((0, 1, 2), 3) if x.shape[2] > 1 else None
        return contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)  # layers are axis 0

    return jax.tree_util.tree_map_with_path(dimensions, params)


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """`ema + (1-d)(params-ema)`, with d at most (1+n)/(10+n) at step n so that the initial values
    fade early."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)


def count_params(tree: Tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
