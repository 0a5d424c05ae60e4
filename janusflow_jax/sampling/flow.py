"""Rectified flow: times, interpolation, guidance and the solver. Independent of the model.

Convention (docs/model.md): t = 0 is noise, t = 1 is data, `z_t = t*x + (1-t)*z0`, and the target
velocity is `x - z0`. States, times and steps are float32, whatever the model computes in.
Source: arXiv 2411.07975 section 3.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.config import SamplerConfig

Velocity = Callable[[Array, Array, bool], tuple[Array, Array | None]]
"""(z [B,h,w,C], t [], whether it is guided) -> conditional velocity; unconditional velocity or
None."""


def sample_time(key: Array, kind: str = "logit_normal", shift: float = 1.0) -> Float[Array, ""]:
    """One training time in (0, 1): logit-normal(0, 1) or uniform, then shifted.

    `shift` s maps t to t / (t + s*(1-t)): s > 1 gives more weight to noise, 1 changes nothing.
    """
    if kind == "uniform":
        t = jax.random.uniform(key, dtype=jnp.float32)
    elif kind == "logit_normal":
        t = jax.nn.sigmoid(jax.random.normal(key, dtype=jnp.float32))
    else:
        raise ValueError(f"time: expected logit_normal or uniform; got {kind!r}")
    return shifted(t, shift)


def shifted(t: Any, shift: float) -> Any:
    """Moves times in [0, 1] toward noise (shift > 1) or data; 0 and 1 stay."""
    return t if shift == 1 else t / (t + shift * (1 - t))


def interpolate(
    x: Float[Array, "*b h w C"], noise: Float[Array, "*b h w C"], t: Float[Array, "*b"]
) -> Float[Array, "*b h w C"]:
    """`t*x + (1-t)*noise`."""
    t = t[..., None, None, None]
    return t * x + (1 - t) * noise


def guide(cond: Array, uncond: Array | None, scale: float | Array) -> Array:
    """Classifier-free guidance (arXiv 2207.12598): `scale*cond - (scale-1)*uncond`."""
    return cond if uncond is None else scale * cond - (scale - 1) * uncond


def solver_times(cfg: SamplerConfig) -> np.ndarray:
    """The times float64[N + 1] of the states of N steps, from 0 to 1."""
    return shifted(np.arange(cfg.steps + 1) / cfg.steps, cfg.shift)


def guided_steps(cfg: SamplerConfig) -> np.ndarray:
    """Which steps have guidance, bool[N]."""
    t = solver_times(cfg)[:-1]
    return (cfg.guide_from <= t) & (t < cfg.guide_until)


def step_times(cfg: SamplerConfig) -> np.ndarray:
    """`solver_times` in float32, by the arithmetic of `solve`."""
    return shifted(np.arange(cfg.steps + 1, dtype=np.float32) / np.float32(cfg.steps), cfg.shift)


def coefficients(cfg: SamplerConfig, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of every step h and r/2 of `solve`, float32[N] each, if it begins with step `first`."""
    times, guided = solver_times(cfg), guided_steps(cfg)
    h = np.diff(times)
    r = np.append(0.0, h[1:] / h[:-1])
    r[1:][guided[1:] != guided[:-1]] = 0.0
    r[first : first + 1] = 0.0
    return h.astype(np.float32), (r / 2).astype(np.float32)


def advance(z: Array, v: Array, before: Array | None, h: Array, half_r: Array) -> Array:
    """One step of `solve`; `before` is the velocity of the last step, None for Euler's method."""
    slope = v if before is None else (1 + half_r) * v - half_r * before
    return z + slope * h


def solve(
    velocity: Velocity,
    noise: Float[Array, "B h w C"],
    guidance_scale: float | Array,
    cfg: SamplerConfig,
) -> tuple[Float[Array, "B h w C"], Float[Array, "N B h w C"]]:
    """Follows the velocity from t = 0 to 1.

    Order 1 is Euler's method, `z += h v(t)`. Order 2 is the Adams-Bashforth method for steps of
    unequal size, `z += h ((1 + r/2) v(t) - r/2 v_before)` with r = h / h_before; its first step,
    and the first where guidance begins or ends, is Euler's.

    Returns:
      the state at t = 1, and the state after every step.
    """
    guided = guided_steps(cfg)
    nodes = jnp.arange(cfg.steps), *map(jnp.asarray, coefficients(cfg))

    def steps(state: Any, first: int, end: int, is_guided: bool) -> tuple[Any, Array]:
        def step(state: Any, node: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            z, before = state
            k, h, half_r = node
            # The arithmetic of the first version, so that stored seeds keep their bits.
            t = shifted(k.astype(jnp.float32) / cfg.steps, cfg.shift)
            v = guide(*velocity(z, t, is_guided), guidance_scale)
            z = advance(z, v, before, h, half_r)
            return (z, v if cfg.order == 2 else None), z

        return lax.scan(step, state, jax.tree.map(lambda x: x[first:end], nodes))

    z = noise.astype(jnp.float32)
    state, states = (z, jnp.zeros_like(z) if cfg.order == 2 else None), []
    begin = 0
    for is_guided, group in itertools.groupby(guided):
        end = begin + len(list(group))
        state, more = steps(state, begin, end, bool(is_guided))
        states.append(more)
        begin = end
    return state[0], lax.concatenate(states, 0)
