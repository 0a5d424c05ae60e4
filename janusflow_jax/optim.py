"""The optimizer and what is trainable: AdamW, clipping and warm-up by optax; EMA; freezing.

A frozen part is an argument of the step, not a masked gradient: it takes no gradient and no
optimizer memory (PROTOTYPES section 5).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from janusflow_jax.config import OptimConfig

Tree = dict[str, Any]


def schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, then (if decay_steps) linear to 0 at the last step."""
    parts = [optax.linear_schedule(cfg.lr / max(cfg.warmup_steps, 1), cfg.lr, cfg.warmup_steps)]
    bounds = [cfg.warmup_steps]
    parts.append(optax.constant_schedule(cfg.lr))
    if cfg.decay_steps:
        parts.append(optax.linear_schedule(cfg.lr, 0.0, cfg.decay_steps))
        bounds.append(max(num_steps - cfg.decay_steps, cfg.warmup_steps))
    return optax.join_schedules(parts, bounds)


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            schedule(cfg, num_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        ),
    )


def split(params: Tree, train_parts: tuple[str, ...]) -> tuple[Tree, Tree]:
    """Two trees with disjoint parts: trained and frozen."""
    train = {k: v for k, v in params.items() if k in train_parts}
    return train, {k: v for k, v in params.items() if k not in train_parts}


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """`ema + (1-d)(params-ema)` with d warmed up as (1+n)/(10+n), so early averages are not stuck
    at the start."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)


def count_params(tree: Tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
